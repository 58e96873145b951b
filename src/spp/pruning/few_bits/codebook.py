"""Codebooks without a zero: 2^bits values, as many below zero as above it, of which the largest is 127.

A survivor w of a group of scale s is stored as the code of the value c for which s c is nearest to w. Zero is no value
of a codebook, so that a survivor never becomes a zero; zeros are in the bitmask and have no code. Survivors of pruning
have two humps with a gap around zero, so that the levels |c| begin at about 0.12 of the largest before they are fitted.

Shapes: L = 2^bits / 2 levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
"""The largest level."""

BYTE = 8
_FIRST = 0.12


def usual_levels(bits: int) -> Tensor:
    """Levels that are evenly spaced, (L,) fp32, ascending; for 8 bits, all integers up to 127, and 127 once more."""
    count = 2 ** (bits - 1)
    if bits == BYTE:
        return torch.arange(1, count + 1.0).clamp_(max=LARGEST)
    return (torch.linspace(_FIRST, 1, count) * LARGEST).round_()


def codebook(levels: Tensor) -> Tensor:
    """The values (2^bits,) int8 of levels (L,), ascending: -127 ... 127."""
    return torch.cat((-levels.flip(0), levels)).to(torch.int8)


def nearest_level(magnitudes: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest of some levels (L,) for numbers >= 0 of any shape, int64."""
    return torch.bucketize(magnitudes.contiguous(), (levels[1:] + levels[:-1]) / 2)


def codes(values: Tensor, levels: Tensor) -> Tensor:
    """Codes (indices into `codebook`) of the values nearest to numbers of any shape, uint8; 0 counts as positive."""
    nearest = nearest_level(values.abs(), levels)
    return torch.where(values < 0, len(levels) - 1 - nearest, len(levels) + nearest).to(torch.uint8)


def moved_levels(magnitudes: Tensor, scales: Tensor, importance: Tensor, levels: Tensor) -> Tensor:
    """One step of k-means: the levels that are best for the numbers that are nearest to each, the largest being 127.

    With l_k the level of the numbers n in its part, sum h_n (w_n - s_n l_k)^2 is least for
    l_k = sum h s w / sum h s^2; a level without numbers stays.

    Args:
        magnitudes: (N,) |w|.
        scales: (N,) s > 0.
        importance: (N,) h >= 0.
        levels: (L,).
    """
    nearest = nearest_level(magnitudes / scales, levels)
    total, weight = (
        torch.zeros_like(levels, dtype=torch.float64).index_add_(0, nearest, (importance * scales * part).double())
        for part in (magnitudes, scales)
    )
    moved = torch.where(weight > 0, total / weight.clamp(min=torch.finfo(torch.float64).tiny), levels.double())
    return (moved * (LARGEST / moved[-1])).float()
