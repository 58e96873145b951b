"""Merge a model that is larger than memory: against a plain copy of its files, and what a kill costs.

    python scripts/make_synthetic_model.py --gigabytes 20 --sparse 2:4 --adapter FOLDER/adapter FOLDER/model
    python -m benchmarks.merging FOLDER/model FOLDER/adapter --threads 2 [--json]

The files are copied and merged in turn, `--repeats` times, each into a new folder that goes afterwards, so that the
disk needs room for one result at a time. Every turn begins with the model out of the page cache, and ends with the
result on the disk (fsync). Then a merge is killed (SIGKILL) half-way and repeated, whose files have to be those of the
last merge, bit by bit; `spp verify` is timed; and a zero of the result is set to a small number, which it has to find.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import add_run_arguments, append_rows, machine_columns, print_table
from spp.adapters.merge_record import FILE
from spp.checkpoints.atomic_folder import work_folder
from spp.checkpoints.checkpoint import VERIFICATION, Checkpoint
from spp.checkpoints.json_files import read_json, sync

_LOOK_EVERY = 0.05  # seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print it, or append it to the CSV file."""
    args = _parser().parse_args(arguments)
    machine = machine_columns("cpu")
    with tempfile.TemporaryDirectory(dir=args.work or args.model.parent, prefix="merged-") as folder:
        found = measure(args, Path(folder))
    row = {**machine, "rounding": args.rounding, "dtype": args.dtype, **found}
    if args.json:
        print(json.dumps(row))
        return
    append_rows(args.csv, [row])
    print_table(f"{args.model.name}, {found['disk_bytes'] / 1e9:.3g} GB", [row], _HEADINGS)


_HEADINGS = {
    "copy_seconds": "copy, s",
    "merge_seconds": "merge, s",
    "of_copy_speed": "of copy speed",
    "verify_seconds": "verify, s",
    "peak_bytes": "peak MiB",
    "resumed_seconds": "resumed, s",
    "resumed_peak_bytes": "peak",
}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures.

    Raises:
        SystemExit: a run failed, the two results differ, the proof is not there, or a lost zero is not found.
    """
    base, merged = Checkpoint.open(args.model), folder / "merged"
    speed = _copy_and_merge(base, folder / "copied", merged, args)
    digests = _digests(merged)
    proof = read_json(merged / VERIFICATION)
    if not proof["verified"]:
        raise SystemExit(f"{VERIFICATION} does not say that the zeros were kept")
    verified = _verify(base, merged, args)
    shutil.rmtree(merged)
    resumed = _kill_and_resume(base, merged, args)
    if different := sorted(name for name, digest in _digests(merged).items() if digests.get(name) != digest):
        raise SystemExit(f"the merge that was killed has other bits in {', '.join(different)}")
    return {
        "repeats": args.repeats,
        "files": len(base.shards),
        "disk_bytes": sum(path.stat().st_size for path in base.shards),
        "merged": len(proof["tensors"]),
        "zeros": proof["zeros"],
        **speed,
        **verified,
        **resumed,
    }


def _copy_and_merge(base: Checkpoint, copied: Path, merged: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Copy and merge in turn, `--repeats` times; the last merge stays."""
    copies, merges, peaks = [], [], []
    for _ in range(args.repeats):
        shutil.rmtree(merged, ignore_errors=True)
        copies.append(_copy(base, copied))
        shutil.rmtree(copied)
        _forget(base)
        seconds, peak = _run(args, merged)
        merges.append(seconds)
        peaks.append(peak)
    copy, merge = statistics.median(copies), statistics.median(merges)
    return {
        "copy_seconds": round(copy, 2),
        "merge_seconds": round(merge, 2),
        "of_copy_speed": round(copy / merge, 4),
        "peak_bytes": max(peaks),
    }


def _verify(base: Checkpoint, merged: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Time `spp verify`, and lose a zero of the result, which it has to find."""
    _forget(base)
    seconds, peak = _spp(["verify", str(args.model), str(merged)], args.threads)
    _require_caught(base, merged, args)
    return {"verify_seconds": round(seconds, 2), "verify_peak_bytes": peak}


def _kill_and_resume(base: Checkpoint, merged: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Kill a merge half-way, and time the run that finishes it."""
    _forget(base)
    done = _kill_half_way(args, merged, len(base.names))
    seconds, peak = _run(args, merged)
    return {"killed_after": done, "resumed_seconds": round(seconds, 2), "resumed_peak_bytes": peak}


def _copy(base: Checkpoint, out: Path) -> float:
    """Seconds of a plain copy of the weights."""
    _forget(base)
    start = time.perf_counter()
    out.mkdir()
    for path in base.shards:
        shutil.copyfile(path, out / path.name)
        sync(out / path.name)
    return time.perf_counter() - start


def _forget(base: Checkpoint) -> None:
    """Put the model's files out of the page cache, as they are where a model is larger than memory."""
    for path in base.shards:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _run(args: argparse.Namespace, out: Path) -> tuple[float, int]:
    return _spp(_command(args, out), args.threads)


def _command(args: argparse.Namespace, out: Path) -> list[str]:
    return ["merge", str(args.model), str(args.adapter), str(out), "--rounding", args.rounding, "--dtype", args.dtype]


def _spp(command: list[str], threads: int | None, exit_code: int = 0) -> tuple[float, int]:
    """Seconds of a whole process, Python's start included, and its resident memory at its highest, in bytes."""
    start = time.perf_counter()
    process = _start(command, threads)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != exit_code:
        raise SystemExit(f"spp {' '.join(command)} ended with exit code {process.returncode}, not {exit_code}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def _start(command: list[str], threads: int | None) -> subprocess.Popen[bytes]:
    limit = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return subprocess.Popen([sys.executable, "-m", "spp", *command], env=os.environ | limit, stdout=subprocess.DEVNULL)


def _kill_half_way(args: argparse.Namespace, out: Path, tensors: int) -> int:
    """Kill a merge when its record has half of the tensors or more; how many there were."""
    process, record = _start(_command(args, out), args.threads), work_folder(out) / FILE
    while process.poll() is None:
        if record.is_file() and (done := len(read_json(record))) >= tensors / 2:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return done
        time.sleep(_LOOK_EVERY)
    raise SystemExit("the merge was over before it could be killed; take a larger model")


def _require_caught(base: Checkpoint, merged: Path, args: argparse.Namespace) -> None:
    """Set a zero in the middle of the result to a small number, and see `spp verify` find it."""
    result = Checkpoint.open(merged)
    name = next(name for name in reversed(result.names) if name.endswith("proj.weight"))
    width = result.tensor(name).element_size()
    flat = base.tensor(name).reshape(-1)
    index = int(torch.nonzero(flat == 0)[flat.numel() // 8])
    with result.files[name].open("r+b") as file:
        file.seek(result.offsets[name] + index * width)
        file.write(b"\x01" + bytes(width - 1))  # the smallest number that is not zero
    _spp(["verify", str(args.model), str(merged)], args.threads, exit_code=1)


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    digests = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merging", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of a sparse model")
    parser.add_argument("adapter", type=Path, help="folder of an SPP adapter for it")
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), default="nearest")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--work", type=Path, help="folder for the results while it runs (default: beside the model)")
    add_run_arguments(parser, repeats=3, csv_name="merging.csv")
    return parser


if __name__ == "__main__":
    main()
