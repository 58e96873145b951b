"""What the benchmarks share: interleaved timing, facts about the machine, rows of CSV, sparse random weights."""

from __future__ import annotations

import argparse
import csv
import fcntl
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from spp.runtime.environment import environment, versions

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "benchmarks" / "data"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_BUSY = 0.5

Step = Callable[[], object]
"""One execution of what is measured."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Times of one method in milliseconds, and on a GPU the most memory that a call took beyond what was there."""

    times: Sequence[float]
    extra_bytes: int | None = None

    @property
    def median(self) -> float:
        """The middle time."""
        return statistics.median(self.times)

    def columns(self) -> dict[str, Any]:
        """As columns of a CSV row. The 90th percentile is the smallest time that 90 % of the times do not exceed."""
        ordered = sorted(self.times)
        return {
            "repeats": len(ordered),
            "min_ms": round(ordered[0], 4),
            "median_ms": round(self.median, 4),
            "p90_ms": round(ordered[math.ceil(0.9 * len(ordered)) - 1], 4),
        }


def measure(
    methods: Mapping[str, Step | None],
    repeats: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Measured | None]:
    """Time the methods in turn, so that a slow minute of the machine meets all of them.

    Every other round goes backwards, so that no method always runs in the wake of the same one.

    Args:
        methods: name -> what to time, or None for what this machine lacks, which stays None.
        repeats: rounds, after one that is not counted.
        device: cpu or cuda.
        clock: seconds, for the CPU.
    """
    steps = {name: step for name, step in methods.items() if step is not None}
    extra = {name: _extra_bytes(step, device) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats):
        for name in list(steps) if round_ % 2 == 0 else reversed(steps):
            times[name].append(_milliseconds(steps[name], device, clock))
    return {name: Measured(times=times[name], extra_bytes=extra[name]) if name in steps else None for name in methods}


def _milliseconds(step: Step, device: str, clock: Callable[[], float]) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    began = clock()
    step()
    return (clock() - began) * 1e3


def _extra_bytes(step: Step, device: str) -> int | None:
    """Run once to warm up; on a GPU, see how much memory that took."""
    if device != "cuda":
        step()
        return None
    step()  # compiles and allocates what stays
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ratio(measured: Measured, to: Measured | None) -> float | str:
    """Ratio of the medians, or nothing for a CSV cell."""
    return round(measured.median / to.median, 4) if to else ""


def machine_columns(device: str) -> dict[str, Any]:
    """The first columns of every row: when, on what, with which versions. The same for all rows of a run.

    `load` is how many processes were running in the minute before; a warning is given where others are in the way.
    """
    facts, found = environment(), versions()
    if (load := os.getloadavg()[0]) > _BUSY:
        # Threads that wait for each other wait for the others' time slices, milliseconds for every product.
        print(f"warning: the load is {load:.1f} before anything runs here; times will be wrong", file=sys.stderr)
    on_gpu = device == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "hardware": torch.cuda.get_device_name() if on_gpu else facts["cpu"],
        "instructions": "" if on_gpu else facts["cpu_instructions"],
        "threads": torch.get_num_threads(),
        "load": round(load, 2),
        **{name: found[name] for name in ("torch", "peft", "spp")},
    }


def run_worker(name: str, argument: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m benchmarks.NAME` with an argument as JSON, in the folder where we are; its output is captured."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", f"benchmarks.{name}", json.dumps(argument)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file, all of them or none, with a header if it is new; other processes may do so, too.

    Raises:
        ValueError: the file has other columns.
    """
    columns = list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        file.seek(0)
        header = next(csv.reader(file), None)
        if header is not None and header != columns:
            raise ValueError(f"{path} has the columns {header}, and these rows {columns}; move the old file away")
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        if header is None:
            writer.writeheader()
        writer.writerows(rows)
        os.write(file.fileno(), text.getvalue().encode())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, as text; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def sparse_weight(out_features: int, in_features: int, density: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A random weight (O, I) of which the largest of each row are kept, as many as `density` says; the rest is zero.

    It is made in blocks of rows, so that nothing else of its size is ever in memory.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(out_features, in_features, dtype=dtype)
    removed = round(in_features * (1 - density))
    for rows in weight.split(256):
        drawn = torch.randn(rows.shape, generator=generator) * 0.02
        if removed:
            magnitude = drawn.abs()
            drawn[magnitude <= magnitude.kthvalue(removed, dim=1, keepdim=True).values] = 0
        rows.copy_(drawn)
    return weight


TIMES = {"method": "method", "min_ms": "min ms", "median_ms": "median ms", "p90_ms": "p90 ms"}
"""Headings of the columns that every table has."""


def shape_argument(text: str) -> tuple[int, int]:
    """Read `4096x11008` as (O, I)."""
    try:
        out_features, in_features = (int(number) for number in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write OxI, as in 4096x11008") from None
    return out_features, in_features


def add_run_arguments(parser: argparse.ArgumentParser, *, repeats: int, csv_name: str) -> None:
    """The options that all scripts have."""
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds over all methods (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="default: what torch takes")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and write no CSV")
    parser.add_argument("--csv", type=Path, default=DATA / csv_name, help="file to append to (default: %(default)s)")


def print_table(title: str, rows: Iterable[Mapping[str, Any]], headings: Mapping[str, str]) -> None:
    """CSV rows as a table of some of their columns, with other headings; bytes are shown in MiB."""
    table = Table(title=title, title_justify="left", box=None)
    for name, heading in headings.items():
        table.add_column(heading, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(name, row[name]) for name in headings))
    Console().print(table)


def _cell(column: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value / 2**20:.0f}" if column.endswith("_bytes") else significant(value)


def significant(value: float) -> str:
    """At least three digits that count, and none that do not."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"
