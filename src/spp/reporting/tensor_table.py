"""The report's table of tensors: what pruning and fine-tuning did to each, with totals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spp.reporting.units import share

Counts = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: its heading, how it follows from a tensor's counts (None: unknown), and how it is written."""

    heading: str
    value: Callable[[Counts], float | None]
    write: Callable[[Any], str]


@dataclass(frozen=True)
class Entry:
    """A cell: its text, and the number that it is sorted by: empty where that is not known, None where it is words."""

    text: str
    key: str | None


@dataclass(frozen=True)
class Row:
    """One tensor; `failed` where its zeros were not kept."""

    name: str
    failed: bool
    entries: Sequence[Entry]


def _count(value: int) -> str:
    return f"{value:,}"


def _get(key: str) -> Callable[[Counts], float | None]:
    return lambda counts: counts.get(key)


def _unchanged(counts: Counts) -> float | None:
    survivors, unchanged = counts.get("survivors"), counts.get("unchanged")
    return unchanged / survivors if survivors and unchanged is not None else None


COLUMNS = (
    Column("Sparsity", _get("sparsity"), share),
    Column("Zeros", _get("zeros"), _count),
    Column("Offenders", _get("offenders"), _count),
    Column("NaN/inf", _get("non_finite"), _count),
    Column("Survivors", _get("survivors"), _count),
    Column("Underflowed", _get("underflowed"), _count),
    Column("Unchanged", _unchanged, share),
    Column("Sign flips", _get("sign_flips"), _count),
    Column("Largest change", _get("largest_relative_change"), share),
)


def tensor_table(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Headings, a row for every tensor that was pruned or compared, and the totals of compared ones."""
    pruned = (results.get("sparsity") or {}).get("tensors") or {}
    compared = (results.get("verification") or {}).get("tensors") or {}
    names = list(dict.fromkeys([*pruned, *compared]))
    if not names:
        return None
    rows = []
    for name in names:
        counts = {**(compared.get(name) or {})}
        counts["sparsity"] = (pruned.get(name) or {}).get("sparsity")
        rows.append(Row(name, failed(counts), _entries(counts)))
    return {
        "headings": [column.heading for column in COLUMNS],
        "rows": rows,
        "totals": _entries(_total(list(compared.values()), results)),
    }


def failed(counts: Counts) -> bool:
    """Whether a tensor breaks the promise: a zero that is none any more, or a new NaN or infinity."""
    return bool(counts.get("offenders") or counts.get("non_finite"))


def _entries(counts: Counts) -> list[Entry]:
    entries = []
    for column in COLUMNS:
        value = column.value(counts)
        entries.append(Entry("", "") if value is None else Entry(column.write(value), repr(value)))
    return entries


def _total(proofs: Sequence[Counts], results: Mapping[str, Any]) -> Counts:
    total: dict[str, Any] = {"sparsity": (results.get("sparsity") or {}).get("overall")}
    for key in ("zeros", "offenders", "non_finite", "survivors", "underflowed", "unchanged", "sign_flips"):
        found = [proof[key] for proof in proofs if key in proof]
        total[key] = sum(found) if found else None
    changes = [proof["largest_relative_change"] for proof in proofs if "largest_relative_change" in proof]
    total["largest_relative_change"] = max(changes, default=None)
    return total
