"""Benchmark rows as a table: values that all rows share appear once, and a column has one number format."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from spp.reporting.inputs import Benchmark
from spp.reporting.tensor_table import Entry
from spp.reporting.units import size


def benchmark_table(benchmark: Benchmark) -> dict[str, Any]:
    """The benchmark's name, the values that all rows share, and all other columns: heading, if numeric, entries."""
    columns = {name: [row[name] for row in benchmark.rows] for name in benchmark.rows[0]}
    same = {name: values[0] for name, values in columns.items() if len(set(values)) == 1}
    varying = {name: _entries(name, values) for name, values in columns.items() if name not in same}
    return {
        "name": benchmark.name,
        "same": [(_words(name), value) for name, value in same.items() if value],
        "headings": [(_words(name), any(entry.key for entry in entries)) for name, entries in varying.items()],
        "rows": list(zip(*varying.values(), strict=True)) or [()] * len(benchmark.rows),
    }


def _words(column: str) -> str:
    """The heading of a column: `median_ms` -> `median, ms`; bytes get no unit here, as their values have one."""
    name = column.removesuffix("_bytes")
    return (f"{name[:-3]}, ms" if name.endswith("_ms") else name).replace("_", " ")


def _entries(column: str, values: Sequence[str]) -> list[Entry]:
    numbers = [_number(value) for value in values]
    known = [number for number in numbers if number is not None]
    if not known or len(known) < sum(bool(value) for value in values):  # one of them at least is not a number
        return [Entry(value, None) for value in values]
    write = size if column.endswith("_bytes") else _writer(known)
    return [Entry("", "") if number is None else Entry(write(number), repr(number)) for number in numbers]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _writer(numbers: Sequence[float]) -> Callable[[float], str]:
    """The number format of a column: no decimals for counts, else enough for three digits of its smallest value."""
    if all(number.is_integer() for number in numbers):
        return "{:,.0f}".format
    sizes = [abs(number) for number in numbers if number and math.isfinite(number)]
    decimals = min(max(2 - math.floor(math.log10(min(sizes))), 0), 4) if sizes else 0
    return f"{{:,.{decimals}f}}".format
