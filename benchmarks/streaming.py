"""Prune a model that is larger than memory: what it takes beyond forward passes and criterion, and what a kill costs.

    python scripts/make_synthetic_model.py --gigabytes 20 /tmp/model
    python -m benchmarks.streaming /tmp/model --threads 2 [--json]

The model is pruned twice. The first run is left alone; the second is killed (SIGKILL) in the middle of its blocks,
and repeated. Its files have to be the first one's, bit by bit. The disk needs room for two results.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import spp
from benchmarks.common import DATA, append_rows, machine_columns, print_table, run_worker
from spp.pruning.memory_estimate import predict_pruning

_CASE = ("criterion", "pattern", "samples", "window")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one case, and print it, or append it to the CSV file."""
    args = _parser().parse_args(arguments)
    values = {"model": str(args.model), **{name: getattr(args, name) for name in (*_CASE, "device")}}
    machine = machine_columns(args.device)
    with tempfile.TemporaryDirectory(dir=args.work or args.model.parent, prefix="pruned-") as folder:
        found = measure(values, Path(folder), args.threads)
    row = {**machine, **{name: values[name] for name in _CASE}, **found}
    if args.json:
        print(json.dumps(row))
        return
    append_rows(args.csv, [row])
    case = ", ".join(f"{name} {values[name]}" for name in _CASE)
    print_table(f"{args.model.name}, {found['disk_bytes'] / 1e9:.3g} GB, {case}", [row], _HEADINGS)


_HEADINGS = {
    "predicted_bytes": "predicted MiB",
    "peak_bytes": "peak",
    "resumed_peak_bytes": "resumed",
    "seconds": "seconds",
    "forward_seconds": "forwards",
    "criterion_seconds": "criterion",
    "overhead": "the rest",
}


def measure(values: dict[str, Any], folder: Path, threads: int | None) -> dict[str, Any]:
    """The figures of a case.

    Args:
        values: options of `spp prune`, without the output.
        folder: where the two results may lie, for a while.
        threads: of torch.

    Raises:
        SystemExit: a run failed, or the two results differ.
    """
    whole, killed = folder / "whole", folder / "killed"
    prediction = predict_pruning(spp.PruneOptions.build({**values, "out": str(whole)}))
    print(f"predicted: {prediction.total / 2**20:.0f} MiB", file=sys.stderr)
    alone = _run(values, whole, threads)
    until_killed = _run(values, killed, threads, last_block=prediction.blocks // 2)
    resumed = _run(values, killed, threads)
    if different := _differences(whole, killed):
        raise SystemExit(f"the run that was killed has other bits in {', '.join(different)}")
    known = alone["forward_seconds"] + alone["criterion_seconds"]
    return {
        "blocks": prediction.blocks,
        "disk_bytes": prediction.disk_bytes,
        "predicted_bytes": prediction.total,
        "peak_bytes": alone["peak_bytes"],
        "killed_peak_bytes": until_killed["peak_bytes"],
        "resumed_peak_bytes": resumed["peak_bytes"],
        **{name: round(alone[name], 2) for name in ("seconds", "forward_seconds", "criterion_seconds")},
        "resumed_seconds": round(resumed["seconds"], 2),
        "overhead": round((alone["seconds"] - known) / alone["seconds"], 4),
    }


def _run(values: dict[str, Any], out: Path, threads: int | None, last_block: int | None = None) -> dict[str, Any]:
    """What a process printed at its end."""
    done = run_worker("streaming_worker", [{**values, "out": str(out)}, threads, last_block])
    expected = 0 if last_block is None else -signal.SIGKILL
    if done.returncode != expected:
        raise SystemExit(f"pruning ended with exit code {done.returncode}, not {expected} (-9: out of memory)")
    return json.loads(done.stdout.splitlines()[-1])


def _differences(one: Path, other: Path) -> list[str]:
    """Names of files that are not in both folders with the same bytes."""
    names = sorted({path.name for folder in (one, other) for path in folder.iterdir()})
    _, different, missing = filecmp.cmpfiles(one, other, names, shallow=False)
    return [*different, *missing]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of a dense model")
    parser.add_argument("--criterion", default="wanda")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--samples", type=int, default=4, help="calibration windows (default: %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens in each (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--work", type=Path, help="folder for the results while it runs (default: beside the model)")
    parser.add_argument("--threads", type=int, help="default: what torch takes")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and write no CSV")
    parser.add_argument("--csv", type=Path, default=DATA / "streaming.csv", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    main()
