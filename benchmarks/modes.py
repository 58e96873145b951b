"""What the two modes learn: the bundled model, 2:4, trained in bf16 and fp32 at several learning rates.

The figure is the perplexity of the merged bf16 checkpoint, since that is what is deployed, and of the adapter on top of
the pruned one, before any rounding. Appends rows to data/modes.csv.

python -m benchmarks.modes --steps 60
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import spp
from benchmarks.common import DATA, append_rows, machine_columns, print_table
from spp.pipeline.bundled import bundled_model

WINDOW, BATCH = 256, 4
_RUNS = (("float32", "fused"), ("bfloat16", "fused"), ("bfloat16", "split"))


def main() -> None:
    """Prune once, then train, merge and evaluate for every learning rate, dtype and mode."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.modes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, action="append", help="default: 3e-4, 4e-3, 2e-2, 5e-2")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(_rows(Path(folder), arguments.steps, arguments.learning_rate or [3e-4, 4e-3, 2e-2, 5e-2]))
    machine = machine_columns("cpu")
    append_rows(DATA / "modes.csv", [{**machine, **row} for row in rows])
    print_table("perplexity per token", rows, {name: name.replace("_", " ") for name in rows[0]})


def _rows(folder: Path, steps: int, rates: list[float]) -> Iterator[dict[str, Any]]:
    pruned = str(folder / "pruned")
    spp.prune(spp.PruneOptions.build({"model": str(bundled_model()), "out": pruned, "samples": 32, "window": WINDOW}))
    before = round(_perplexity(pruned), 4)
    for rate in rates:
        for dtype, mode in _RUNS:
            name = f"{rate}-{dtype}-{mode}"
            values = {"model": pruned, "out": folder / f"{name}-adapter", "learning_rate": rate, "max_steps": steps}
            shape = {
                "window": WINDOW,
                "batch_size": BATCH,
                "join_documents": True,
                "dtype": dtype,
                "mode": mode,
                "warmup_ratio": 0.03,
            }
            report = spp.train(spp.TrainOptions.build({**values, **shape}))
            merged = folder / f"{name}-merged"
            proof = spp.merge(spp.MergeOptions(model=pruned, adapter=report.out, out=merged))
            last = [loss for _, loss in report.losses[-10:]]
            yield {
                "learning_rate": rate,
                "dtype": dtype,
                "mode": mode,
                "steps": report.steps,
                "tokens": report.tokens,
                "pruned_perplexity": before,
                "last_losses": round(sum(last) / len(last), 4),
                "adapter_perplexity": round(_perplexity(pruned, adapter=report.out), 4),
                "merged_perplexity": round(_perplexity(str(merged)), 4),
                "unchanged_share": round(proof.unchanged_share, 4),
                "seconds": round(report.seconds, 1),
            }


def _perplexity(model: str, **more: Any) -> float:
    """Of the bundled text's first documents, in fp32, windows that do not overlap."""
    options = {"model": model, "window": WINDOW, "limit": 40, "dtype": "float32", **more}
    return spp.evaluate(spp.EvalOptions.build(options)).perplexity


if __name__ == "__main__":
    main()
