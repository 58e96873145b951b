"""The report's table of tensors: how pruning and fine-tuning changed each of them, with totals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from spp.reporting.results import ComparedTensor, PrunedTensor, RunResults
from spp.reporting.units import share


@dataclass(frozen=True)
class Column:
    """A column: its heading, a tensor's value in it (None: unknown), and the format of that value."""

    heading: str
    value: Callable[[PrunedTensor, ComparedTensor], float | None]
    write: Callable[[Any], str]


@dataclass(frozen=True)
class Entry:
    """A cell: its text, and the number to sort by: empty if that is unknown, None if the cell is text."""

    text: str
    key: str | None


@dataclass(frozen=True)
class Row:
    """The row of one tensor; `failed` if its zeros were not kept."""

    name: str
    failed: bool
    entries: Sequence[Entry]


def _count(value: int) -> str:
    return f"{value:,}"


def _unchanged(tensor: ComparedTensor) -> float | None:
    return tensor.unchanged / tensor.survivors if tensor.survivors and tensor.unchanged is not None else None


COLUMNS = (
    Column("Sparsity", lambda pruned, _: pruned.sparsity, share),
    Column("Zeros", lambda _, compared: compared.zeros, _count),
    Column("Offenders", lambda _, compared: compared.offenders, _count),
    Column("NaN/inf", lambda _, compared: compared.non_finite, _count),
    Column("Survivors", lambda _, compared: compared.survivors, _count),
    Column("Underflowed", lambda _, compared: compared.underflowed, _count),
    Column("Unchanged", lambda _, compared: _unchanged(compared), share),
    Column("Sign flips", lambda _, compared: compared.sign_flips, _count),
    Column("Largest change", lambda _, compared: compared.largest_relative_change, share),
)


def tensor_table(results: RunResults) -> dict[str, Any] | None:
    """Headings, a row for every tensor that was pruned or compared, and the totals of the compared ones."""
    pruned, compared = results.sparsity.tensors, results.verification.tensors
    names = list(dict.fromkeys([*pruned, *compared]))
    if not names:
        return None
    return {
        "headings": [column.heading for column in COLUMNS],
        "rows": [_row(name, pruned.get(name, PrunedTensor()), compared.get(name, ComparedTensor())) for name in names],
        "totals": _entries(PrunedTensor(sparsity=results.sparsity.overall), _total(list(compared.values()))),
    }


def _row(name: str, pruned: PrunedTensor, compared: ComparedTensor) -> Row:
    return Row(name, compared.failed, _entries(pruned, compared))


def _entries(pruned: PrunedTensor, compared: ComparedTensor) -> list[Entry]:
    entries = []
    for column in COLUMNS:
        value = column.value(pruned, compared)
        entries.append(Entry("", "") if value is None else Entry(column.write(value), repr(value)))
    return entries


def _total(tensors: Sequence[ComparedTensor]) -> ComparedTensor:
    """All tensors as one: the sums of their known counts, and the largest of their changes."""

    def total(value: Callable[[ComparedTensor], int | None]) -> int | None:
        known = [count for count in map(value, tensors) if count is not None]
        return sum(known) if known else None

    changes = [one.largest_relative_change for one in tensors if one.largest_relative_change is not None]
    return ComparedTensor.model_construct(  # a sum may need more bits than its parts, which are checked
        zeros=total(lambda one: one.zeros),
        offenders=total(lambda one: one.offenders),
        non_finite=total(lambda one: one.non_finite),
        survivors=total(lambda one: one.survivors),
        underflowed=total(lambda one: one.underflowed),
        unchanged=total(lambda one: one.unchanged),
        sign_flips=total(lambda one: one.sign_flips),
        largest_relative_change=max(changes, default=None),
    )
