"""Stochastic rounding: round up or down at random, so that small updates survive in bf16 on average.

Rounded to nearest, W (1 + e) is W again in bf16 if |e| is below about 2^-9, so a merge can lose everything that was
learned. Rounded stochastically, a share of the weights moves by a whole step to the next number, and the expected sum
of all updates is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 2**20  # numbers at once: few enough for a cache; the order of the random draws depends on it
_BITS = {2: torch.int16, 4: torch.int32}


def round_stochastically(tensor: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round each x to a neighbour in `dtype`: to the upper one with probability (x - lower) / (upper - lower).

    The mean over many draws is x. Values that `dtype` represents exactly, zeros included, do not change. NaN, infinity,
    and values nearer to infinity than to the largest number are rounded to nearest.

    Args:
        tensor: fp32 or fp64, any shape, contiguous.
        dtype: fp16, bf16 or fp32.
        generator: on the CPU; its state determines the result.

    Returns:
        A tensor of the same shape in `dtype`.
    """
    out = torch.empty(tensor.shape, dtype=dtype)
    for whole, rounded in zip(tensor.view(-1).split(_AT_ONCE), out.view(-1).split(_AT_ONCE), strict=True):
        nearest = whole.to(dtype)
        missing = whole - nearest  # exact: the rounding error fits into the wide dtype
        # For one sign, bit patterns are ordered as their values are, so the neighbour's is one more or one less.
        step = (whole.abs() > nearest.abs()).to(_BITS[dtype.itemsize]).mul_(2).sub_(1)
        other = (nearest.view(step.dtype) + step).view(dtype)
        draws = torch.rand(whole.shape, generator=generator, dtype=whole.dtype)
        # False where `nearest` is infinite, since the gap is infinite too, and where anything is NaN.
        takes_other = draws * (other.to(whole.dtype) - nearest).abs() < missing.abs()
        rounded.copy_(torch.where(takes_other, other, nearest))
    return out
