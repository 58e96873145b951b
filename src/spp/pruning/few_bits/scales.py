"""Scales of few-bit weights, one for each row and group of columns, and the levels that fit a matrix.

Shapes: O output features, I input features, G groups of C columns (the last may have fewer), L levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spp.errors import SppError
from spp.pruning.few_bits.codebook import BYTE, LARGEST, moved_levels, nearest_level, usual_levels

# Tried for the largest level, as shares of the largest weight of a group; the best of them is then refined.
_SHARES = (1.0, 0.9, 0.8, 0.65, 0.5, 0.35)
_REFINED = 3
# Steps of k-means, and weights that it looks at.
_FITTED = 8
_SAMPLE = 2**16
_FP16 = torch.finfo(torch.float16)
_SMALLEST = _FP16.smallest_normal * _FP16.eps  # the smallest number above zero
_LARGEST_SCALE = (
    511.75  # of fp16; its product with -128, which int8 has and codebooks have not, is fp16's largest number
)


def grouped(matrix: Tensor, group: int) -> Tensor:
    """A matrix (O, I) as (O, G, C), filled up with zeros."""
    rows, columns = matrix.shape
    return nn.functional.pad(matrix, (0, -columns % group)).view(rows, -1, group)


def ungrouped(groups: Tensor, columns: int) -> Tensor:
    """The matrix (O, I) of some groups (O, G, C)."""
    return groups.flatten(1)[:, :columns]


def search_scales(weight: Tensor, importance: Tensor, levels: Tensor, group: int) -> Tensor:
    """The scales (O, G) fp16 of least sum h (|w| - s l)^2 that a short search finds, l being the level nearest to |w|.

    Some shares of each group's largest weight are tried. From the best one on, scales and levels are fitted to each
    other in turn: for given levels, s = sum h |w| l / sum h l^2.

    Args:
        weight: (O, I) fp32; zeros have no code.
        importance: (I,) h >= 0 of each column.
        levels: (L,).
        group: C.

    Returns:
        Positive scales, so small that no product with a code is beyond fp16. That of a group without weights means
        nothing.

    Raises:
        SppError: a weight is beyond fp16.
    """
    search = _Search(grouped(weight.abs(), group), grouped(importance[None].float(), group), levels)
    largest = search.magnitudes.amax(dim=2)
    if not float(largest.max()) <= _FP16.max:
        raise SppError(f"a weight of {float(largest.max()):.3g} is too large for few bits, whose scales are fp16")
    best = search.at(largest / LARGEST)
    for share in _SHARES[1:]:
        best = best.or_better(search.at(share * largest / LARGEST))
    for _ in range(_REFINED):
        best = best.or_better(search.at(search.fitted(best.found)))
    return best.scales.half()


@dataclass(frozen=True)
class _Candidate:
    """Scales (O, G), the levels found with them (O, G, C), and the error (O, G) of each group."""

    scales: Tensor
    found: Tensor
    error: Tensor

    def or_better(self, other: _Candidate) -> _Candidate:
        """For each group the one of smaller error."""
        better = other.error < self.error
        return _Candidate(
            torch.where(better, other.scales, self.scales),
            torch.where(better[..., None], other.found, self.found),
            torch.where(better, other.error, self.error),
        )


@dataclass(frozen=True)
class _Search:
    """What scales are searched for: magnitudes (O, G, C), the importance of columns (1, G, C), and levels (L,)."""

    magnitudes: Tensor
    importance: Tensor
    levels: Tensor

    def at(self, scales: Tensor) -> _Candidate:
        """The candidate of some scales in fp16: at least its smallest number, so that nothing becomes zero."""
        scales = scales.clamp(min=_SMALLEST, max=_LARGEST_SCALE).half().float()
        found = self.levels[nearest_level(self.magnitudes / scales[..., None], self.levels)]
        error = (found * scales[..., None]).sub_(self.magnitudes).square_().mul_(self.importance)
        return _Candidate(scales, found, error.masked_fill_(self.magnitudes == 0, 0).sum(dim=2))

    def fitted(self, found: Tensor) -> Tensor:
        """The best scales for given levels."""
        weights = found * self.importance * (self.magnitudes != 0)
        return ((weights * self.magnitudes).sum(dim=2) / (weights * found).sum(dim=2)).nan_to_num_(0)


def fitted_levels(weight: Tensor, importance: Tensor, bits: int, group: int) -> Tensor:
    """The levels (L,) for a matrix: k-means on some of its weights, in turn with their scales.

    For 8 bits they are the integers up to 127.

    Args:
        weight: (O, I), any float dtype.
        importance: (I,) of each column.
        bits: of a code.
        group: C.
    """
    levels = usual_levels(bits).to(weight.device)
    magnitudes = weight[:: max(weight.numel() // _SAMPLE, 1)].float().abs()
    present = magnitudes != 0
    if bits == BYTE or not bool(present.any()):
        return levels
    columns = importance.expand(magnitudes.shape)[present]
    for _ in range(_FITTED):
        scales = search_scales(magnitudes, importance, levels, group).float().repeat_interleave(group, dim=1)
        levels = moved_levels(magnitudes[present], scales[:, : weight.shape[1]][present], columns, levels)
    return levels.round_().clamp_(1, LARGEST)
