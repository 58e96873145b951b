"""Sparsity and pattern of every weight matrix in a checkpoint, and values that engines would misread."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from spp.checkpoints.checkpoint import Checkpoint
from spp.checkpoints.hub import resolve_model
from spp.checkpoints.options import InspectOptions
from spp.ops.dtypes import dtype_name
from spp.ops.zeros import all_finite, is_float
from spp.patterns import detect_pattern
from spp.runtime.progress import track


@dataclass(frozen=True, kw_only=True)
class MatrixFacts:
    """One weight matrix, or one tensor that stacks the matrices of several experts.

    Attributes:
        shape: (O, I) for a matrix, however the file holds it; the stored shape for a stack.
        transposed: whether the file holds it as (I, O).
        dtype: dtype in the file; `4 bit` for survivors in so many.
        zeros: zeros of either sign.
        sparsity: share of zeros.
        pattern: the pattern it obeys along its last dimension (`2:4`, `50%`); None for a dense one.
        negative_zeros: zeros that are -0.0; engines that test a weight's bits treat them as non-zeros.
        non_finite: NaN and infinite entries.
    """

    shape: tuple[int, ...]
    transposed: bool
    dtype: str
    zeros: int
    sparsity: float
    pattern: str | None
    negative_zeros: int
    non_finite: int


@dataclass(frozen=True, kw_only=True)
class OtherFacts:
    """All other tensors together: float tensors that are not matrices (norms, biases), and tensors of other dtypes.

    Attributes:
        tensors: number of float tensors.
        parameters: number of their entries.
        zeros: zeros among these.
        negative_zeros: as for a matrix.
        non_finite: as for a matrix.
        not_float: number of tensors of other dtypes (integers, fp8), which are not examined.
    """

    tensors: int
    parameters: int
    zeros: int
    negative_zeros: int
    non_finite: int
    not_float: int


@dataclass(frozen=True, kw_only=True)
class InspectReport:
    """The result of `inspect_model`.

    Attributes:
        matrices: tensor name -> its facts, in the order of the files.
        others: everything else.
        parameters: entries of all float tensors.
        non_zeros: those that are not zero.
        sparsity: share of zeros over all parameters.
        pruned: matrices that are not dense.
        pruned_sparsity: share of zeros over the pruned matrices; None where there is none.
        warnings: one sentence for each thing that engines would misread.
    """

    model: str
    matrices: dict[str, MatrixFacts]
    others: OtherFacts
    parameters: int
    non_zeros: int
    sparsity: float
    pruned: int
    pruned_sparsity: float | None
    warnings: list[str]


@dataclass(frozen=True)
class _Count:
    """Entries, zeros, -0.0 and non-finite entries of some tensors; sums with `+`."""

    entries: int = 0
    zeros: int = 0
    negative_zeros: int = 0
    non_finite: int = 0

    @classmethod
    def of(cls, tensor: Tensor) -> _Count:
        zero = tensor == 0
        return cls(
            tensor.numel(),
            int(zero.count_nonzero()),
            int((zero & torch.signbit(tensor)).count_nonzero()),
            0 if all_finite(tensor) else int((~torch.isfinite(tensor)).count_nonzero()),
        )

    def __add__(self, other: _Count) -> _Count:
        return _Count(
            self.entries + other.entries,
            self.zeros + other.zeros,
            self.negative_zeros + other.negative_zeros,
            self.non_finite + other.non_finite,
        )


def inspect_model(options: InspectOptions) -> InspectReport:
    """Read a checkpoint once, one tensor in memory at a time.

    Raises:
        UsageError: the model is missing.
        SppError: the checkpoint is damaged.
    """
    checkpoint = Checkpoint.open(resolve_model(options.model))
    matrices: dict[str, MatrixFacts] = {}
    in_all, in_pruned, in_others = _Count(), _Count(), _Count()
    others = not_float = 0
    for name, tensor in track(checkpoint.items(), "inspecting", total=len(checkpoint.files)):
        if not is_float(tensor):
            not_float += 1
            continue
        count = _Count.of(tensor)
        in_all += count
        if tensor.ndim not in (2, 3):
            others, in_others = others + 1, in_others + count
            continue
        entry = checkpoint.packed.get(name)
        stored = f"{entry.few_bits.bits} bit" if entry and entry.few_bits else dtype_name(tensor.dtype)
        matrices[name] = facts = _facts(tensor, count, stored, transposed=checkpoint.transposed(name))
        if facts.pattern:
            in_pruned += count
    return InspectReport(
        model=options.model,
        matrices=matrices,
        others=OtherFacts(
            tensors=others,
            parameters=in_others.entries,
            zeros=in_others.zeros,
            negative_zeros=in_others.negative_zeros,
            non_finite=in_others.non_finite,
            not_float=not_float,
        ),
        parameters=in_all.entries,
        non_zeros=in_all.entries - in_all.zeros,
        sparsity=in_all.zeros / max(in_all.entries, 1),
        pruned=sum(facts.pattern is not None for facts in matrices.values()),
        pruned_sparsity=in_pruned.zeros / in_pruned.entries if in_pruned.entries else None,
        warnings=_warnings(in_all, not_float),
    )


def _facts(tensor: Tensor, count: _Count, dtype: str, *, transposed: bool) -> MatrixFacts:
    matrix = tensor.T if transposed and tensor.ndim == 2 else tensor
    pattern = detect_pattern(matrix)
    return MatrixFacts(
        shape=tuple(matrix.shape),
        transposed=matrix is not tensor,
        dtype=dtype,
        zeros=count.zeros,
        sparsity=count.zeros / max(count.entries, 1),
        pattern=str(pattern) if pattern else None,
        negative_zeros=count.negative_zeros,
        non_finite=count.non_finite,
    )


def _warnings(total: _Count, not_float: int) -> list[str]:
    warnings = []
    if total.negative_zeros:
        warnings.append(
            f"{total.negative_zeros:,} zeros are -0.0, which some engines take for values; "
            "spp prune and spp merge write +0.0"
        )
    if total.non_finite:
        warnings.append(f"{total.non_finite:,} entries are NaN or infinite: the weights are damaged")
    if not_float:
        warnings.append(f"{not_float:,} tensors are not fp16, bf16, fp32 or fp64 and were not looked into")
    return warnings


def inspection_table(report: InspectReport) -> Table:
    """One row per matrix; columns for -0.0 and NaN only if there are any; totals and warnings below."""
    others = report.others
    odd = {
        "-0.0": [facts.negative_zeros for facts in report.matrices.values()] + [others.negative_zeros],
        "NaN/inf": [facts.non_finite for facts in report.matrices.values()] + [others.non_finite],
    }
    odd = {label: counts for label, counts in odd.items() if any(counts)}
    # No lines, so that the longest usual name fits into 80 columns.
    table = Table(box=None, pad_edge=False, caption=Text(_totals(report), justify="left"), caption_justify="left")
    table.add_column("tensor", overflow="fold")
    table.add_column("shape")
    table.add_column("dtype")
    for label in ("sparsity", "pattern", *odd):
        table.add_column(label, justify="right")

    shown = [
        (name, " x ".join(map(str, facts.shape)), facts.dtype, f"{facts.sparsity:.2%}", facts.pattern or "dense")
        for name, facts in report.matrices.items()
    ]
    summary = (f"{others.tensors} other tensors", f"{others.parameters:,} entries", "", _share(others), "")
    for index, cells in enumerate([*shown, summary] if others.tensors else shown):
        extra = [f"{counts[index]:,}" for counts in odd.values()]
        # Text, because a name in brackets is no markup.
        table.add_row(*(Text(cell) for cell in (*cells, *extra)))
    return table


def _share(others: OtherFacts) -> str:
    return f"{others.zeros / max(others.parameters, 1):.2%}"


def _totals(report: InspectReport) -> str:
    lines = [
        f"{report.parameters:,} parameters, {report.non_zeros:,} of them not zero: {report.sparsity:.2%} sparse overall"
    ]
    if report.pruned_sparsity is not None:
        lines.append(f"{report.pruned} pruned matrices are {report.pruned_sparsity:.2%} sparse")
    else:
        lines.append("no matrix is pruned")
    return "\n".join(["", *lines] + [f"warning: {warning}" for warning in report.warnings])
