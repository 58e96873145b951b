"""What pruning costs: perplexity by criterion, pattern and model, and what SPP makes of it afterwards.

    python -m benchmarks.pruned_quality --data FOLDER --threads 2 [--model story] [--then-train 200]

FOLDER has the models in benchmarks/evaluated_models.py; without it, there is the bundled one only.

Calibration and evaluation share no text. Every criterion runs on the same windows. With `--then-train`, each pruned
model is fine-tuned and merged too, always from the same data in the same order.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import spp
from benchmarks.common import append_rows, machine_columns
from benchmarks.evaluated_models import EvaluatedModel, add_model_arguments, evaluated_models
from spp.errors import UsageError
from spp.patterns import NM, parse_pattern

PATTERNS = ("50%", "75%", "2:4", "4:8", "2:8")

_CRITERIA = ("magnitude", "magnitude-matrix", "wanda", "ria", "sparsegpt", "admm")
_REFINED = ("wanda", "sparsegpt", "admm")
_RECONSTRUCTED = ("magnitude", "wanda", "ria", "sparsegpt", "admm")
_BEST_VALUES: dict[str, Any] = {"refine": "swaps", "update": "least-squares"}
METHODS: dict[str, dict[str, Any]] = {
    **{name: {"criterion": name} for name in _CRITERIA},
    "wanda + owl": {"criterion": "wanda", "allocation": "owl"},
    "sparsegpt + owl": {"criterion": "sparsegpt", "allocation": "owl"},
    "wanda + dsnot": {"criterion": "wanda", "refine": "dsnot"},
    "wanda + swaps": {"criterion": "wanda", "refine": "swaps"},
    "admm + least squares": {"criterion": "admm", "update": "least-squares"},
    **{f"{name} + swaps + least squares": {"criterion": name} | _BEST_VALUES for name in _REFINED},
    **{f"{name} + reconstruction": {"criterion": name, "reconstruct": "block"} for name in _RECONSTRUCTED},
    "admm + swaps + least squares + reconstruction": {"criterion": "admm", "reconstruct": "block"} | _BEST_VALUES,
    "wanda + reconstruction of A, B": {"criterion": "wanda", "reconstruct": "block", "reconstruct_params": "spp"},
}
"""Name in the table -> options of `spp prune`."""


def measure(evaluated: EvaluatedModel, pattern: str, method: str, folder: Path, steps: int) -> dict[str, Any] | None:
    """Prune, evaluate, and train if `steps` says so; None where the method or the model has no such pattern."""
    options = METHODS[method]
    if options.get("allocation") == "owl" and isinstance(parse_pattern(pattern), NM):
        return None
    began = time.perf_counter()
    pruned = folder / "pruned"
    try:
        report = spp.prune(
            spp.PruneOptions.build(
                {
                    "model": evaluated.model,
                    "out": pruned,
                    "pattern": pattern,
                    "calibration": evaluated.calibration,
                    "samples": evaluated.samples,
                    "window": evaluated.window,
                    "overwrite": True,
                    **options,
                }
            )
        )
    except UsageError as error:
        if "does not divide" not in str(error):
            raise
        return None
    seconds = time.perf_counter() - began
    return {
        "sparsity": round(report.sparsity, 4),
        "prune_seconds": round(seconds, 1),
        "perplexity": round(perplexity(evaluated, str(pruned)), 4),
        "trained_steps": steps,
        "trained_perplexity": round(_trained(evaluated, pruned, folder, steps), 4) if steps else "",
    }


def perplexity(evaluated: EvaluatedModel, model: str) -> float:
    """Per token, in fp32."""
    window = evaluated.evaluation_window or evaluated.window
    options = {"model": model, "text": evaluated.evaluation, "window": window, "limit": evaluated.limit}
    return spp.evaluate(spp.EvalOptions.build(options | {"dtype": "float32"})).perplexity


def _trained(evaluated: EvaluatedModel, pruned: Path, folder: Path, steps: int) -> float:
    """Perplexity of the merged model after SPP fine-tuning on the text that calibration is taken from."""
    adapter, merged = folder / "adapter", folder / "merged"
    spp.train(
        spp.TrainOptions.build(
            {
                "model": str(pruned),
                "out": adapter,
                "data": evaluated.calibration,
                "window": evaluated.window,
                "max_steps": steps,
                "overwrite": True,
            }
        )
    )
    spp.merge(spp.MergeOptions(model=str(pruned), adapter=adapter, out=merged, overwrite=True))
    return perplexity(evaluated, str(merged))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and append each row to the CSV file as it is there."""
    args = _parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for evaluated in evaluated_models(args.data, folder, args.model):
            machine = machine_columns("cpu")
            case = {"model": evaluated.name, "protocol": evaluated.protocol, "samples": evaluated.samples}
            dense = round(perplexity(evaluated, evaluated.model), 4)
            print(f"{evaluated.name}, dense: {dense} ({evaluated.protocol})")
            for pattern in args.pattern or PATTERNS:
                for method in args.method or METHODS:
                    found = measure(evaluated, pattern, method, folder, args.then_train)
                    if found is None:
                        continue
                    append_rows(
                        args.csv, [machine | case | {"pattern": pattern, "method": method, "dense": dense} | found]
                    )
                    print(
                        f"{evaluated.name}, {pattern}, {method}: {found['perplexity']} {found['trained_perplexity']}",
                        flush=True,
                    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruned_quality", description=__doc__.split("\n")[0])
    add_model_arguments(parser, PATTERNS, METHODS, "pruned_quality.csv")
    parser.add_argument("--then-train", type=int, default=0, metavar="STEPS", help="also fine-tune (default: not)")
    return parser


if __name__ == "__main__":
    main()
