"""Read the inputs of a report, results.json files of runs and rows of benchmarks, and check them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spp.checkpoints.json_files import read_json
from spp.errors import UsageError, shown
from spp.reporting.results import RunResults
from spp.runtime.files import reading

RESULTS, RECORDS = "results.json", "stages"
"""Names in the folder of a run: its results, and the folder with the records of finished stages."""

_REQUIRED_COLUMNS = ("date", "device", "hardware")
_WRONG_SHOWN = 5


@dataclass(frozen=True)
class Run:
    """A run: a name that is unique in the report, and the content of its results.json."""

    name: str
    results: RunResults


@dataclass(frozen=True)
class Benchmark:
    """A CSV file of benchmark rows: its name, and the text of every cell by column."""

    name: str
    rows: Sequence[dict[str, str]]


def results_path(path: Path) -> Path:
    """The results.json of a run, given its folder or that file."""
    return path / RESULTS if path.is_dir() else path


def read_results(path: Path) -> RunResults:
    """Read the results of `spp run` from its folder or its results.json.

    Raises:
        UsageError: there are none, the run is unfinished, or the file holds something else.
        SppError: it is not JSON.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    if path.is_dir() and not (path / RESULTS).is_file():
        raise UsageError(f"{path}: {_why_no_results(path)}")
    file = results_path(path)
    results = read_json(file)
    if not isinstance(results, dict) or not {"perplexity", "protocol"} <= set(results):
        raise UsageError(f"{file}: not the results of spp run, which are an object with perplexity and protocol")
    try:
        return RunResults.model_validate(results)
    except ValidationError as error:
        wrong = [_describe(problem) for problem in error.errors()]
        more = f"; and {len(wrong) - _WRONG_SHOWN} more" if len(wrong) > _WRONG_SHOWN else ""
        raise UsageError(
            f"{file}: not the results of spp run: {'; '.join(wrong[:_WRONG_SHOWN])}{more}; make it again with spp run"
        ) from error


def _why_no_results(folder: Path) -> str:
    records = sorted((folder / RECORDS).glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not records:
        return f"no {RESULTS} there; name a folder that spp run wrote, or the file itself"
    done = ", ".join(path.stem for path in records)
    return f"the run is unfinished: no {RESULTS} yet, done are {done}; repeat its spp run command to finish it"


def _describe(problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    place = ".".join(map(str, problem["loc"]))
    place = place if len(place) < 100 else shown(place)
    return f"{place}: {message[0].lower()}{message[1:]}, but it is {shown(problem['input'])}"


def run_names(paths: Sequence[Path]) -> list[str]:
    """The shortest unique ends of paths: a folder's name, with parent folders if two runs have the same name.

    Raises:
        UsageError: a run is given twice.
    """
    places = [_place(path) for path in paths]
    if twice := sorted({str(path) for path, place in zip(paths, places, strict=True) if places.count(place) > 1}):
        raise UsageError(f"the same run is given more than once: {', '.join(twice)}")

    def end(place: Path, length: int) -> str:
        return str(Path(*place.parts[-length:]))

    return [
        next(name for n in count(1) if [end(other, n) for other in places].count(name := end(place, n)) == 1)
        for place in places
    ]


def _place(path: Path) -> Path:
    path = path.resolve()
    return path.parent if path.name == RESULTS else path


def read_benchmark(path: Path) -> Benchmark:
    """Read rows as the scripts in benchmarks/ write them.

    Raises:
        UsageError: there is no such file, or it holds something else.
        SppError: it is not CSV.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; --benchmarks takes CSV files of benchmark rows")
    with reading(path, "CSV in UTF-8", "write it again"), path.open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file, strict=True)) or [[]]
    if missing := [column for column in _REQUIRED_COLUMNS if column not in header]:
        found = ", ".join(header) or "nothing"
        raise UsageError(f"{path}: not benchmark rows: no column {', '.join(missing)} among its columns ({found})")
    if doubled := sorted({column for column in header if header.count(column) > 1}):
        raise UsageError(f"{path}: more than one column has the name {', '.join(doubled)}")
    if not rows:
        raise UsageError(f"{path}: no benchmark rows under its header")
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise UsageError(f"{path}: row {number} has {len(row)} values for {len(header)} columns")
    return Benchmark(path.stem, [dict(zip(header, row, strict=True)) for row in rows])
