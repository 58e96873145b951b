"""SparseGPT (arXiv 2301.00774): remove weights one column at a time and let the rest of the row make up for it.

Each row w minimises the error of its outputs, (w' - w) H (w' - w)^T. With H^-1 = U^T U (U upper triangular), removing
weight j after the columns before it are settled costs w_j^2 / U_jj^2 (up to 1/2) and is best made up for by
w_k -= w_j * U_jk / U_jj for all k > j (SparseGPT, eq. 2 to 4).

Shapes: O output features, I input features, C columns of a block. Weights are held transposed, (I, O), because the
loop walks columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spp.errors import SppError
from spp.patterns import NM, Pattern, Unstructured
from spp.pruning.result import Pruned
from spp.pruning.statistics import Gram, full_fp32

_BLOCK = 128
_DAMPING = 0.01
_RETRY = 10


@dataclass(frozen=True)
class Inverse:
    """The inverse of a damped Hessian.

    Attributes:
        factor: (I, I) fp32, upper triangular U with H^-1 = U^T U.
        dead: (I,) bool, inputs that were zero in all of the calibration.
        note: what the user should know about how it came out, or None.
    """

    factor: Tensor
    dead: Tensor
    note: str | None


class InverseFactor(Gram):
    """What SparseGPT needs of a layer's inputs: `Inverse`, once for all layers that share them."""

    def _finish(self, mean: Tensor) -> Inverse:
        return inverse(2 * mean)


def inverse(hessian: Tensor) -> Inverse:
    """Damp and invert a Hessian (I, I), fp32.

    Raises:
        SppError: it has no Cholesky factor, even with ten times the damping.
    """
    dead = hessian.diagonal() == 0
    with full_fp32():
        factor, note = _inverse_factor(hessian, dead)
    return Inverse(factor, dead, note)


def prune(weight: Tensor, statistics: Inverse | None, pattern: Pattern) -> Pruned:
    """Remove the weights of least W^2 / U_jj^2 and update the survivors, all in fp32.

    Unstructured: compared over all rows of a block of 128 columns. N:M: compared within each group when the loop
    reaches it, that is after the compensation of everything before it. Weights that are zero already stay zero. Columns
    whose input was zero in all of the calibration are removed (their H_jj is set to 1).

    Args:
        weight: (O, I), any float dtype.
        statistics: `InverseFactor`.
        pattern: how many weights to remove.

    Returns:
        The weight in fp32.
    """
    if statistics is None:
        raise ValueError("SparseGPT needs the Gram matrix of the inputs")
    if isinstance(pattern, NM):
        pattern.require_fit(weight.shape[-1])
    with full_fp32():
        work = weight.float().T.contiguous()
        work[statistics.dead] = 0
        mask = _walk_blocks(work, statistics.factor, pattern, gone=work == 0)
    return Pruned(work.T.contiguous(), mask.T.contiguous(), statistics.note)


def _inverse_factor(hessian: Tensor, dead: Tensor) -> tuple[Tensor, str | None]:
    """The upper Cholesky factor U of the damped inverse, H^-1 = U^T U, and a note if it took more damping."""
    for times in (1, _RETRY):
        damped = hessian.clone()
        diagonal = damped.diagonal()
        diagonal[dead] = 1
        diagonal += times * _DAMPING * diagonal.mean()
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(upper).all():
            note = f"took {times} times the usual damping to invert its Hessian" if times > 1 else None
            return upper, note
    raise SppError(
        f"SparseGPT cannot invert the Hessian, with {_RETRY} times the usual damping either; "
        "calibrate with more samples, or use the criterion wanda"
    )


def _walk_blocks(work: Tensor, factor: Tensor, pattern: Pattern, gone: Tensor) -> Tensor:
    """Prune `work` (I, O) in place, block of columns by block; returns the mask (I, O) of the survivors.

    `gone` (I, O) marks the weights that must be zero in any case.
    """
    mask = torch.empty_like(gone)
    for start, end in _block_bounds(len(work), pattern):
        block, upper, out = work[start:end], factor[start:end, start:end], gone[start:end]
        if isinstance(pattern, Unstructured):
            # Counting from the first column makes the total exact, whatever the rounding in single blocks.
            count = pattern.removed_of(end * work.shape[1]) - pattern.removed_of(start * work.shape[1])
            mask[start:end] = _keep_in_block(_scores(block, upper.diagonal(), out), count)
        errors = _walk_columns(block, upper, out, mask[start:end], pattern)
        # The columns after the block make up for all of its errors at once: W -= E U.
        work[end:] -= factor[start:end, end:].T @ errors
    return mask


def _block_bounds(columns: int, pattern: Pattern) -> list[tuple[int, int]]:
    """Starts and ends of the blocks: 128 columns, or the nearest multiple of M below (at least M)."""
    group = pattern.m if isinstance(pattern, NM) else 1
    size = max(_BLOCK // group, 1) * group
    return [(start, min(start + size, columns)) for start in range(0, columns, size)]


def _walk_columns(block: Tensor, upper: Tensor, gone: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
    """Settle the columns of `block` (C, O) from left to right, in place; returns the scaled errors (C, O).

    `upper` is the block's (C, C) part of U. `mask` (C, O) is complete on return; an N:M pattern fills it here.
    """
    errors = torch.empty_like(block)
    for j in range(len(block)):
        if isinstance(pattern, NM) and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            scores = _scores(block[group], upper.diagonal()[group], gone[group])
            mask[group] = pattern.keep_mask(scores.T).T
        mask[j] &= ~gone[j]
        kept = torch.where(mask[j], block[j], 0.0)
        errors[j] = (block[j] - kept) / upper[j, j]
        block[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
        block[j] = kept
    return errors


def _scores(block: Tensor, diagonal: Tensor, gone: Tensor) -> Tensor:
    """|W| / U_jj of a (C, O) block; -inf for the weights that are zero in any case, so that they go first.

    The published W^2 / U_jj^2 has the same order, but can overflow.
    """
    return torch.where(gone, -torch.inf, block.abs() / diagonal[:, None])


def _keep_in_block(scores: Tensor, count: int) -> Tensor:
    """True for all but the `count` lowest scores (C, O) of a block; ties go by row, then by column."""
    order = scores.T.flatten().argsort(stable=True)
    keep = torch.ones_like(order, dtype=torch.bool)
    keep[order[:count]] = False
    return keep.view(scores.shape[::-1]).T
