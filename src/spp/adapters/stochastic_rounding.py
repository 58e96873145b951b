"""Round to fewer bits at random, so that the mean is right: small updates survive in bf16, if not in every weight.

To the nearest, W (1 + e) is W again in bf16 where |e| is below about 2^-9, and a merge can lose everything that was
learned. At random, a share of the weights takes the whole step to the next number, and the sum of all steps is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 2**20  # numbers; small enough for a cache, and what the random numbers' order is fixed by
_BITS = {2: torch.int16, 4: torch.int32}


def round_stochastically(tensor: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Each number x as one of its two neighbours in `dtype`, the upper with probability (x - lower) / (upper - lower).

    The mean over many draws is x. What `dtype` holds exactly, zeros included, stays; NaN, infinity and what is nearer
    to infinity than to the largest number are as in rounding to the nearest.

    Args:
        tensor: fp32 or fp64, any shape, contiguous.
        dtype: fp16, bf16 or fp32.
        generator: of a CPU; the result is fixed by its state.

    Returns:
        a tensor of the same shape in `dtype`.
    """
    out = torch.empty(tensor.shape, dtype=dtype)
    for whole, rounded in zip(tensor.view(-1).split(_AT_ONCE), out.view(-1).split(_AT_ONCE), strict=True):
        nearest = whole.to(dtype)
        missing = whole - nearest  # exact: what rounding loses fits into the wide dtype
        # The bits of numbers of one sign are in the order of their size, so the neighbour's are one more or one less.
        step = (whole.abs() > nearest.abs()).to(_BITS[dtype.itemsize]).mul_(2).sub_(1)
        other = (nearest.view(step.dtype) + step).view(dtype)
        draws = torch.rand(whole.shape, generator=generator, dtype=whole.dtype)
        # Never true where the nearest is infinite, since the gap is, too; nor where anything is NaN.
        takes_other = draws * (other.to(whole.dtype) - nearest).abs() < missing.abs()
        rounded.copy_(torch.where(takes_other, other, nearest))
    return out
