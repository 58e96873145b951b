"""Quantize the sparse matrices of a model block by block, each one calibrated on the quantized blocks before it.

Per block: one pass for the Hessians of its matrices' inputs, error feedback and descent on codes, and one pass of the
quantized block that computes the inputs of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spp.errors import SppError, UsageError
from spp.models.architecture import Matrix, prunable_matrices
from spp.models.blockwise.journal import Journal
from spp.models.blockwise.walk import BlocksToWalk, Walk
from spp.ops.packed import zero_share
from spp.pruning import least_squares
from spp.pruning.calibration.input_hooks import Statistics, collect_statistics
from spp.pruning.calibration.input_statistics import Gram
from spp.pruning.criteria import sparsegpt
from spp.pruning.engine import my_batches
from spp.pruning.few_bits.descent import descended
from spp.pruning.few_bits.quantize import Quantized, with_feedback
from spp.pruning.prune_block import check_statistic, run_all
from spp.runtime import distributed

Finish = Callable[[int, Mapping[str, Quantized]], Any]
"""What to do with the quantized matrices of a block, by full name of the parameter; returns facts, as JSON values."""

WALK = "quantize"
"""The name of the pass in the journal."""


def quantize_blocks(
    blocks: BlocksToWalk,
    windows: Tensor,
    journal: Journal,
    finish: Finish,
    *,
    bits: int,
    group: int,
    least_zeros: float,
    parameters: Container[str] | None = None,
) -> dict[str, float]:
    """Quantize the blocks that are not finished according to the journal, in place.

    Matrices of experts, and those that no token reaches, are left as they are.

    Args:
        blocks: of the model.
        windows: (samples, window) int64 token ids to calibrate on.
        journal: progress, and hidden states.
        finish: see `Finish`.
        bits, group: see `spp.ops.few_bits.FewBitWeight`.
        least_zeros: share of zeros from which a matrix is quantized.
        parameters: full names of those that may be; None: all.

    Returns:
        Full name of each parameter -> the error of its layer's outputs; see `Quantized.error`.

    Raises:
        SppError: NaN or infinity in weights or activations, or a Hessian that cannot be inverted; names the layer.
    """
    if distributed.world_size() > 1:
        raise UsageError("packing runs in one process; start it without torchrun")
    with torch.no_grad():
        walk = Walk(blocks, my_batches(windows, "error feedback", blocks), journal)
        walk.start(WALK)
        for index in walk.unfinished("quantizing"):
            with blocks.loaded(index) as block:
                chosen = {
                    f"{one.name}.{one.parameter}": one
                    for one in _sparse(prunable_matrices(walk.name(index), block), least_zeros)
                }
                if parameters is not None:
                    chosen = {name: one for name, one in chosen.items() if name in parameters}
                quantized, errors = _quantize(chosen, block, walk, index, bits=bits, group=group)
                facts = finish(index, quantized)
                if not walk.is_last(index):
                    walk.propagate(index, block)
            walk.finish({"errors": errors, "finished": facts})
    return {name: error for block in journal.results(WALK) for name, error in block["errors"].items()}


def _sparse(matrices: list[Matrix], least_zeros: float) -> Iterator[Matrix]:
    """Those of linear layers that have so many zeros."""
    return (one for one in matrices if one.expert is None and zero_share(one.weight) >= least_zeros)


def _quantize(
    matrices: Mapping[str, Matrix], block: nn.Module, walk: Walk, index: int, *, bits: int, group: int
) -> tuple[dict[str, Quantized], dict[str, float]]:
    """Quantize matrices of a block in place, and the errors that they then have."""
    if not matrices or not walk.reaches(index):
        return {}, {}
    seen = collect_statistics(list(matrices.values()), [Gram], partial(run_all, walk.runs(index), block))
    quantized, errors = {}, {}
    for name, matrix in matrices.items():
        if not seen[matrix.name][Gram].tokens:
            continue
        try:
            quantized[name], errors[name] = _quantized(matrix, seen[matrix.name], bits, group)
        except SppError as error:
            raise type(error)(f"{matrix.name}: {error}") from error
        matrix.weight.copy_(quantized[name].values())
    return quantized, errors


def _quantized(matrix: Matrix, statistics: Statistics, bits: int, group: int) -> tuple[Quantized, float]:
    """A matrix in few bits, and the error of its layer's outputs."""
    gram = statistics[Gram]
    check_statistic(matrix.name, gram)
    hessian = gram.value(least_squares.damped)
    importance, weight = hessian.diagonal(), matrix.weight.contiguous()
    found = with_feedback(weight, gram.value(sparsegpt.damped_inverse), importance, bits, group)
    found = descended(weight, found, hessian)
    return found, found.error(weight, gram.value())
