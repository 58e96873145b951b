"""Sparsity patterns: which weights of a matrix are kept, with exact counts.

Shapes: O output features, I input features (the dimension that a pattern runs along).

A pattern is written as users write it: `"50%"` removes half of every matrix, `"2:4"` keeps 2 of every 4 consecutive
weights along the input dimension (N:M is always N *kept* of M). The module needs no torch to parse a pattern,
so that a command line can check one before anything heavy is imported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING

from spp.errors import UsageError
from spp.keep_masks import keep_all_but_lowest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Unstructured:
    """Remove the same share of every matrix, at free positions.

    Which weights compete for removal is the criterion's choice: those of a row (magnitude, Wanda), or those of a
    block of columns (SparseGPT).

    Attributes:
        sparsity: share of weights removed, strictly between 0 and 1.
    """

    sparsity: float

    def __str__(self) -> str:
        # Never in exponent notation, which `parse_pattern` does not read.
        return f"{Decimal(f'{self.sparsity * 100:.15g}'):f}%"

    def fits(self, in_features: int) -> bool:
        """Every row length can be pruned to any ratio."""
        return True

    def removed_of(self, count: int) -> int:
        """How many of `count` weights are removed: int(count * sparsity), as in the published code."""
        # The small factor undoes binary rounding: 0.29 * 100 is 28.999..., and must count as 29.
        return int(count * self.sparsity * (1 + 1e-12))

    def rounded_down(self, columns: int) -> Unstructured:
        """The ratio at which every row of this length loses the whole number int(I * sparsity), as published."""
        return Unstructured(self.removed_of(columns) / columns)

    def keep_mask(self, scores: Tensor, first_row: int = 0) -> Tensor:
        """True for the weights to keep: in each row, all but the lowest scores, so that the matrix is exact.

        Where the share of a row is no whole number, rows lose one more or one less, evenly spread: the first r rows
        together lose `removed_of(r * I)`, whatever r.

        Args:
            scores: (O, I), rows of a matrix in any float dtype; a NaN counts as the highest score.
            first_row: number of the first of these rows in the matrix.

        Returns:
            (O, I) bool. Ties go by position (stable sort), never by a threshold, so the count is exact.
        """
        rows, columns = scores.shape
        upto = [self.removed_of(row * columns) for row in range(first_row, first_row + rows + 1)]
        counts = [end - start for start, end in pairwise(upto)]
        if len(distinct := set(counts)) == 1:
            return keep_all_but_lowest(scores, distinct.pop())
        keep = scores.isnan()
        for count in distinct:
            some = [row for row in range(rows) if counts[row] == count]
            keep[some] = keep_all_but_lowest(scores[some], count)
        return keep

    def excess(self, mask: Tensor) -> int:
        """How many weights a mask (O, I) keeps above what this matrix may keep."""
        return max(int(mask.count_nonzero()) - (mask.numel() - self.removed_of(mask.numel())), 0)

    def violations(self, weight: Tensor) -> int:
        """How many zeros a weight (O, I) is short of O * int(I * sparsity), the fewest that pruning code makes."""
        demanded = weight.shape[:-1].numel() * self.removed_of(weight.shape[-1])
        return max(demanded - int((weight == 0).count_nonzero()), 0)


@dataclass(frozen=True)
class NM:
    """Keep `n` of every `m` consecutive weights along the input dimension.

    Attributes:
        n: weights kept of each group, 1 <= n < m.
        m: group length.
    """

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Share of weights removed: 1 - n / m."""
        return 1 - self.n / self.m

    def fits(self, in_features: int) -> bool:
        """Whether `m` divides the input dimension."""
        return in_features % self.m == 0

    def require_fit(self, in_features: int) -> None:
        """Raise a UsageError where `m` does not divide the input dimension."""
        if not self.fits(in_features):
            raise UsageError(
                f"pattern {self} needs an input dimension divisible by {self.m}, but this weight has {in_features}; "
                "choose another pattern or pass --skip-indivisible to leave such layers dense"
            )

    def keep_mask(self, scores: Tensor, first_row: int = 0) -> Tensor:
        """True for the `n` highest scores of every group of `m` along the last dimension.

        Args:
            scores: (O, I) with I a multiple of m, any float dtype; a NaN counts as the highest score.
            first_row: makes no difference here, as it does to `Unstructured`.

        Returns:
            (O, I) bool; ties go by position.

        Raises:
            UsageError: m does not divide I.
        """
        self.require_fit(scores.shape[-1])
        groups = scores.unflatten(-1, (-1, self.m))
        return keep_all_but_lowest(groups, self.m - self.n).flatten(-2)

    def excess(self, mask: Tensor) -> int:
        """How many groups of a mask (O, I) keep more than `n` weights."""
        return self.violations(mask)

    def violations(self, weight: Tensor) -> int:
        """How many groups of a weight (O, I) keep more than `n` weights; all of them where m does not divide I."""
        if not self.fits(weight.shape[-1]):
            return weight.numel() // self.m or 1
        kept = (weight.unflatten(-1, (-1, self.m)) != 0).sum(dim=-1)
        return int((kept > self.n).sum())


Pattern = Unstructured | NM

# Patterns to look for in a matrix; of two with the same sparsity, the stricter one comes first.
KNOWN_NM = (NM(1, 4), NM(2, 8), NM(2, 4), NM(4, 8))


def parse_pattern(text: str) -> Pattern:
    """Read `"2:4"`, `"50%"` or `"0.5"`.

    Raises:
        UsageError: `text` is none of these, or asks for nothing or for everything to be removed.
    """
    if found := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text):
        n, m = int(found[1]), int(found[2])
        if 1 <= n < m:
            return NM(n, m)
        raise UsageError(f"pattern {text!r}: N:M keeps N of every M weights, so it needs 1 <= N < M, as in 2:4")
    if found := re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*", text):
        sparsity = float(Decimal(found[1]) / (100 if found[2] else 1))
        if 0 < sparsity < 1:
            return Unstructured(sparsity)
        hint = f"; did you mean {text.strip()}%?" if not found[2] and 1 < sparsity < 100 else ""
        raise UsageError(
            f"pattern {text!r}: the share of weights to remove must be above 0 and below 100 %, as in 50% or 0.5{hint}"
        )
    raise UsageError(f"pattern {text!r} is not understood; write N:M (N kept of M) as in 2:4, or a share as in 50%")


def detect_pattern(weight: Tensor) -> Pattern | None:
    """The pattern of a weight (O, I): the first of `KNOWN_NM` that it obeys, else its unstructured sparsity.

    None if it is dense: less than 1 % of it is zero.
    """
    sparsity = float((weight == 0).count_nonzero()) / max(weight.numel(), 1)
    if sparsity < 0.01:
        return None
    for pattern in KNOWN_NM:
        if sparsity >= pattern.sparsity - 1e-9 and pattern.fits(weight.shape[-1]) and not pattern.violations(weight):
            return pattern
    return Unstructured(round(sparsity, 4))
