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
from typing import TYPE_CHECKING

from spp.errors import UsageError

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
        """How many of `count` compared weights go: int(count * sparsity), the published exact count."""
        # The small factor undoes binary rounding: 0.29 * 100 is 28.999..., and 29 is meant.
        return int(count * self.sparsity * (1 + 1e-12))

    def keep_mask(self, scores: Tensor) -> Tensor:
        """True for the weights to keep: in each row, all but the `int(I * sparsity)` lowest scores.

        Args:
            scores: (O, I), any float dtype; a NaN counts as the highest score.

        Returns:
            (O, I) bool. Ties go by position (stable sort), never by a threshold, so the count is exact.
        """
        return keep_all_but_lowest(scores, self.removed_of(scores.shape[-1]))

    def violations(self, weight: Tensor) -> int:
        """How many zeros a (O, I) weight lacks of O * int(I * sparsity), the least that any criterion makes."""
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

    def keep_mask(self, scores: Tensor) -> Tensor:
        """True for the `n` highest scores of every group of `m` along the last dimension.

        Args:
            scores: (O, I) with I a multiple of m, any float dtype; a NaN counts as the highest score.

        Returns:
            (O, I) bool; ties go by position.

        Raises:
            UsageError: m does not divide I.
        """
        self.require_fit(scores.shape[-1])
        groups = scores.unflatten(-1, (-1, self.m))
        return keep_all_but_lowest(groups, self.m - self.n).flatten(-2)

    def violations(self, weight: Tensor) -> int:
        """Groups of a (O, I) weight that keep more than `n` weights; all of them where m does not divide I."""
        if not self.fits(weight.shape[-1]):
            return weight.numel() // self.m or 1
        kept = (weight.unflatten(-1, (-1, self.m)) != 0).sum(dim=-1)
        return int((kept > self.n).sum())


Pattern = Unstructured | NM

# What a matrix is checked against when its pattern is not known: the stricter of equal sparsity first.
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
    """The pattern a (O, I) weight has: a known N:M that it obeys, else its unstructured ratio, else None if dense.

    A matrix of which under 1 % is zero counts as dense. The N:M answer is the strictest known one.
    """
    sparsity = float((weight == 0).count_nonzero()) / max(weight.numel(), 1)
    if sparsity < 0.01:
        return None
    for pattern in KNOWN_NM:
        if sparsity >= pattern.sparsity - 1e-9 and pattern.fits(weight.shape[-1]) and not pattern.violations(weight):
            return pattern
    return Unstructured(round(sparsity, 4))


# Groups up to this size are ranked by M (M - 1) / 2 comparisons, longer ones are searched for a threshold.
_SMALL_GROUP = 16
# Rows longer than this are searched by themselves, from a sample of them.
_LONG_ROW = 2**17
_SAMPLE = 2**13
# Scores looked at together: on a CPU they stay in the cache, elsewhere a few launches do for a matrix.
_PART, _GPU_PART = 2**19, 2**26


def keep_all_but_lowest(scores: Tensor, count: int) -> Tensor:
    """True everywhere but at the `count` lowest scores of the last dimension, as `_reference`, without sorting.

    Beside the result, the scratch is a few times `_PART` entries (long rows: and a tenth of a row).
    """
    keep = scores.isnan().contiguous()  # of transposed scores it is not
    has_nan, size = bool(keep.any()), scores.shape[-1]
    if count in (0, size):
        return keep.fill_(count == 0)
    rows, kept = scores.reshape(-1, size), keep.view(-1, size)
    at_once = 1 if size > _LONG_ROW else rows_at_once(scores)
    for part, out in zip(rows.split(at_once), kept.split(at_once), strict=True):
        if has_nan:  # comparisons do not order it
            out.copy_(_reference(part, count))
        elif size <= _SMALL_GROUP:
            out.copy_(keep_in_groups(part.T.contiguous(), count).T)
        elif size <= _LONG_ROW:
            out.copy_(_keep_in_rows(part, count))
        else:
            _keep_in_long_row(part[0], count, out[0])
    return keep


def rows_at_once(matrix: Tensor) -> int:
    """How many rows of a matrix (..., I) are worked on together."""
    return max((_GPU_PART if matrix.is_cuda else _PART) // max(matrix.shape[-1], 1), 1)


def keep_in_groups(groups: Tensor, removed: int) -> Tensor:
    """True for all but the `removed` lowest of every group, where groups lie along the first dimension.

    Small groups are ranked by counting who beats whom: member j has the rank
    #{k < j: s_k <= s_j} + #{k > j: s_k < s_j}, as in a stable sort. Each comparison is one of long contiguous rows.

    Args:
        groups: (M, K), any float dtype, without NaN.
        removed: how many of each group go.

    Returns:
        (M, K) bool.
    """
    if len(groups) > _SMALL_GROUP:
        return keep_all_but_lowest(groups.T, removed).T
    rank = groups.new_ones(len(groups), 1).cumsum(dim=0).sub_(1).char().repeat(1, groups.shape[1])
    for distance in range(1, len(groups)):
        # Where the earlier member is the higher one, it moves up by one, and the later one down.
        higher = (groups[:-distance] > groups[distance:]).view(rank.dtype)
        rank[:-distance] += higher
        rank[distance:] -= higher
    return rank >= removed


def _keep_in_rows(rows: Tensor, count: int) -> Tensor:
    """The mask of some rows (O, I): a threshold for each, and of the scores equal to it the first ones go."""
    limit = rows.kthvalue(count, dim=-1, keepdim=True).values
    keep = rows > limit
    missing = rows.shape[-1] - count - keep.sum(dim=-1, keepdim=True)
    if missing.any():
        ties = rows == limit
        place = ties.cumsum(dim=-1)
        keep |= ties & (place > place[:, -1:] - missing)
    return keep


def _keep_in_long_row(row: Tensor, count: int, out: Tensor) -> None:
    """Write the mask of one row (I,), part by part."""
    limit = _kth_lowest(row, count)
    parts = row.split(_GPU_PART if row.is_cuda else _PART)
    ties_to_go = count - sum(int((part < limit).sum()) for part in parts)
    for part, kept in zip(parts, out.split(len(parts[0])), strict=True):
        place = (part == limit).cumsum(dim=-1)
        kept.copy_((part > limit) | ((part == limit) & (place > ties_to_go)))
        ties_to_go = max(ties_to_go - int(place[-1]), 0)


def _kth_lowest(values: Tensor, count: int) -> Tensor:
    """The `count`-th lowest of values (K,), a scalar.

    A sample says between which two values it must be, but for bad luck; only those in between are searched.
    """
    sample = values[:: max(len(values) // _SAMPLE, 1)].sort().values
    # Four standard deviations of the number of sampled values below the one that is looked for.
    place, slack = count * len(sample) // len(values), 2 * int(len(sample) ** 0.5)
    low, high = sample[max(place - slack, 0)], sample[min(place + slack, len(sample) - 1)]
    parts = values.split(_GPU_PART if values.is_cuda else _PART)
    below = sum(int((part < low).sum()) for part in parts)
    between = [part[(part >= low) & (part <= high)] for part in parts]
    found = sum(map(len, between))
    if not below < count <= below + found:
        return values.kthvalue(count).values
    candidates = values.new_empty(found)
    for part, room in zip(between, candidates.split([len(part) for part in between]), strict=True):
        room.copy_(part)
    return candidates.kthvalue(count - below).values


def _reference(scores: Tensor, count: int) -> Tensor:
    """What `keep_all_but_lowest` means: False at the first `count` places of a stable sort, NaN last."""
    order = scores.argsort(dim=-1, stable=True)
    everything = order >= 0
    return everything.scatter(-1, order[..., :count], False)
