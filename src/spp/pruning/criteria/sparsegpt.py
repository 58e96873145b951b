"""SparseGPT (arXiv 2301.00774): remove weights column by column, and update the rest of the row to compensate.

Each row w minimizes the error of its outputs, (w' - w) H (w' - w)^T. With H^-1 = U^T U (U upper triangular), removing
weight j after the columns before it are settled costs w_j^2 / U_jj^2 (up to 1/2), and is compensated best by
w_k -= w_j * U_jk / U_jj for all k > j (SparseGPT, eq. 2 to 4).

Columns are settled in blocks of 128, and within a block by halves, so that nearly all compensation is products of
matrices. Before a column is settled it has been updated for all columns to its left, as in the published loop.

Shapes: O output features, I input features, C columns of a block. Weights are stored transposed, (I, O), because the
loop runs over columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spp.errors import SppError
from spp.keep_masks import keep_all_but_lowest, keep_in_groups
from spp.ops.zeros import all_finite
from spp.patterns import NM, Pattern, Unstructured
from spp.pruning.calibration.input_statistics import full_fp32
from spp.pruning.criteria.result import Pruned

_BLOCK = 128
_DAMPING = 0.01
_RETRY = 10
# Columns that are settled one by one, where the pattern does not say it.
_LEAF = 8
# Triangles up to this size are inverted by back substitution.
_TRIANGLE = 128


@dataclass(frozen=True)
class Inverse:
    """The inverse of a damped Hessian, H^-1 = U^T U with U upper triangular.

    Attributes:
        factor: (I, I) fp32, the rows of U divided by their diagonal entries, so that its own diagonal is one.
        scale: (I,) fp32, the diagonal of U.
        dead: (I,) bool, inputs that were zero in all of the calibration.
        note: a remark for the user, or None.
    """

    factor: Tensor
    scale: Tensor
    dead: Tensor
    note: str | None


def damped_inverse(hessian: Tensor) -> Inverse:
    """Damp and invert a Hessian (I, I), fp32, which stays as it is; takes three quarters of one more.

    Raises:
        SppError: it has no Cholesky factor, even with ten times the damping.
    """
    dead = hessian.diagonal() == 0
    with full_fp32():
        factor, note = _inverse_factor(hessian, dead)
    scale = factor.diagonal().clone()
    return Inverse(factor.div_(scale[:, None]), scale, dead, note)


def prune(weight: Tensor, inverse: Inverse, pattern: Pattern) -> Pruned:
    """Remove the weights of least W^2 / U_jj^2 and update the survivors, all in fp32.

    Unstructured: compared over all rows of a block of 128 columns. N:M: compared within each group when the loop
    reaches it, that is after the compensation of everything before it. Weights that are zero already stay zero. Columns
    whose input was zero in all of the calibration are removed (their H_jj is set to 1).

    Args:
        weight: (O, I), any float dtype.
        inverse: of the layer's damped Hessian, from `damped_inverse`.
        pattern: how many weights to remove.

    Returns:
        The weight in fp32. Beside it and its mask, the scratch is one fp32 and one bool copy of the weight.
    """
    if isinstance(pattern, NM):
        pattern.require_fit(weight.shape[-1])
    return _compensated(weight, weight != 0, inverse, pattern)


def update(weight: Tensor, mask: Tensor, inverse: Inverse) -> Pruned:
    """Remove what is not in a mask (O, I) and update the survivors, as `prune` does with the mask that it finds."""
    return _compensated(weight, mask & (weight != 0), inverse, None)


def _compensated(weight: Tensor, may_stay: Tensor, inverse: Inverse, pattern: Pattern | None) -> Pruned:
    """Remove weights column by column: all that may not stay (O, I), and of the others what a pattern demands."""
    work, mask = torch.empty(weight.shape[::-1], device=weight.device), may_stay.T.contiguous()
    work.copy_(weight.T)[inverse.dead] = 0
    mask[inverse.dead] = False
    with full_fp32():
        _walk_blocks(work, mask, inverse, pattern)
    return Pruned(work.T.contiguous(), mask.T.contiguous(), inverse.note)


def _inverse_factor(hessian: Tensor, dead: Tensor) -> tuple[Tensor, str | None]:
    """The upper triangular U (I, I) of the damped inverse, H^-1 = U^T U, and a note if it took more damping."""
    for times in (1, _RETRY):
        if (factor := _damped_factor(hessian, dead, times * _DAMPING)) is not None:
            return factor, f"took {times} times the usual damping to invert its Hessian" if times > 1 else None
    raise SppError(
        f"SparseGPT cannot invert the Hessian, with {_RETRY} times the usual damping either; "
        "calibrate with more samples, or use the criterion wanda"
    )


def _damped_factor(hessian: Tensor, dead: Tensor, damping: float) -> Tensor | None:
    """U (I, I) for one damping, a share of the mean diagonal; None where rounding leaves none.

    With J the matrix that reverses an order, J H J = L L^T gives H = (J L J) (J L J)^T, so U = (J L J)^-1 = J L^-1 J:
    one Cholesky factor and the inverse of a triangle, half the work of inverting H and factorising the inverse.
    """
    work = hessian.flip(0, 1)
    diagonal = work.diagonal()
    diagonal[dead.flip(0)] = 1
    diagonal += damping * diagonal.mean()
    # Transposed, which changes nothing in a symmetric matrix, it has LAPACK's layout, and L takes its place.
    lower, failed = work.T, torch.empty((), dtype=torch.int32, device=work.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if failed:
        return None
    _invert_triangle(lower)
    if not all_finite(work):
        return None
    _reverse(work)
    return lower


def _invert_triangle(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]."""
    size = len(lower)
    if size <= _TRIANGLE:
        one = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, one, upper=False))
        return
    half = size // 2
    first, below, second = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    product = torch.linalg.solve_triangular(second, below, upper=False)
    below.copy_(torch.linalg.solve_triangular(first, product.neg_(), upper=False, left=False))
    del product
    _invert_triangle(first)
    _invert_triangle(second)


def _reverse(matrix: Tensor) -> None:
    """Reverse the order of the rows and columns of a square matrix in place, some rows at a time."""
    size = len(matrix)
    for start in range(0, size // 2, _BLOCK):
        end = min(start + _BLOCK, size // 2)
        upper, lower = matrix[start:end], matrix[size - end : size - start]
        before = upper.flip(0, 1)
        upper.copy_(lower.flip(0, 1))
        lower.copy_(before)
    if size % 2:
        matrix[size // 2] = matrix[size // 2].flip(0)


def _walk_blocks(work: Tensor, mask: Tensor, inverse: Inverse, pattern: Pattern | None) -> None:
    """Prune `work` (I, O), and its mask of what may stay, in place, block of columns by block."""
    size = block_size(pattern)
    errors = torch.empty_like(work[:size])
    for start in range(0, len(work), size):
        end = min(start + size, len(work))
        columns = _Columns(
            weights=work[start:end],
            errors=errors[: end - start],
            mask=mask[start:end],
            unit=inverse.factor[start:end, start:end].contiguous(),
            scale=inverse.scale[start:end, None],
            pattern=pattern,
        )
        if isinstance(pattern, Unstructured):
            # Counting from the first column makes the total exact, whatever the rounding in single blocks.
            columns.choose(pattern.removed_of(end * work.shape[1]) - pattern.removed_of(start * work.shape[1]))
        columns.settle(0, end - start)
        columns.clear()
        # The columns after the block make up for all of its errors at once: W -= E U.
        work[end:].addmm_(inverse.factor[start:end, end:].T, columns.errors, alpha=-1)


def block_size(pattern: Pattern | None) -> int:
    """128 columns, or the nearest multiple of M below (at least M)."""
    group = pattern.m if isinstance(pattern, NM) else 1
    return max(_BLOCK // group, 1) * group


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """A block of columns that is being pruned in place.

    Attributes:
        weights: (C, O).
        errors: (C, O), the removed weights of each settled column; zero for kept weights.
        mask: (C, O) bool; before the choice, False for what must be zero in any case.
        unit: (C, C), the block's part of the `Inverse`'s factor.
        scale: (C, 1), that of its scale.
        pattern: how many weights to remove; None if the mask says which.
    """

    weights: Tensor
    errors: Tensor
    mask: Tensor
    unit: Tensor
    scale: Tensor
    pattern: Pattern | None

    def choose(self, count: int) -> None:
        """Mask the `count` lowest scores of the block; ties go by row, then by column."""
        scores = self._scores(0, len(self.weights)).T.contiguous()
        self.mask.logical_and_(keep_all_but_lowest(scores.view(1, -1), count).view_as(scores).T)

    def settle(self, start: int, end: int) -> None:
        """Settle some columns that have been updated for all columns to their left."""
        leaf = self.pattern.m if isinstance(self.pattern, NM) else _LEAF
        if end - start <= leaf:
            self._settle_one_by_one(start, end)
            return
        middle = start + -(-(end - start) // leaf) // 2 * leaf
        self.settle(start, middle)
        self.weights[middle:end].addmm_(self.unit[start:middle, middle:end].T, self.errors[start:middle], alpha=-1)
        self.settle(middle, end)

    def _settle_one_by_one(self, start: int, end: int) -> None:
        if isinstance(self.pattern, NM):
            keep = keep_in_groups(self._scores(start, end), self.pattern.m - self.pattern.n)
            self.mask[start:end].logical_and_(keep)
        nothing = self.weights.new_zeros(())
        for j in range(start, end):
            if j > start:
                self.weights[j].addmv_(self.errors[start:j].T, self.unit[start:j, j], alpha=-1)
            torch.where(self.mask[j], nothing, self.weights[j], out=self.errors[j])

    def _scores(self, start: int, end: int) -> Tensor:
        """|W| / U_jj of some columns; -inf for the weights that are zero in any case, so that they go first.

        The published W^2 / U_jj^2 has the same order, but can overflow.
        """
        scores = self.weights[start:end].abs().div_(self.scale[start:end])
        return scores.masked_fill_(~self.mask[start:end], -torch.inf)

    def clear(self) -> None:
        """Set the removed weights to +0.0; `errors` has their values."""
        self.weights.masked_fill_(~self.mask, 0)
