"""Random weights of few-bit survivors, and the dense matrices that they stand for, for several tests."""

from __future__ import annotations

import torch
from torch import Tensor

from spp.ops.few_bits import BITS, GROUPS, FewBitWeight

PATTERNS = ("none", "some", "half", "all", "4 of 64", "2:4")


def draw_mask(shape: tuple[int, int], pattern: str, generator: torch.Generator) -> Tensor:
    """Which entries survive; the last row of `some` has none, and fixed patterns fall back to half at odd widths."""
    out_features, in_features = shape
    kept_of = {"4 of 64": (4, 64), "2:4": (2, 4)}.get(pattern)
    if kept_of and in_features % kept_of[1] == 0:
        kept, of = kept_of
        drawn = torch.rand(out_features, in_features // of, of, generator=generator)
        return (drawn <= drawn.kthvalue(kept, dim=2, keepdim=True).values).view(shape)
    density = {"none": 0.0, "some": 0.1, "all": 1.0}.get(pattern, 0.5)
    mask = torch.rand(shape, generator=generator) < density
    mask[-1] &= pattern != "some"
    return mask


def draw_few_bits(
    shape: tuple[int, int], bits: int, group: int, pattern: str = "half", seed: int = 0
) -> tuple[FewBitWeight, Tensor]:
    """A weight, and what it stands for in fp64: codebooks from -128 to 127 in any order, and scales of either sign."""
    assert bits in BITS and group in GROUPS
    generator = torch.Generator().manual_seed(seed)
    mask = draw_mask(shape, pattern, generator)
    scales = (torch.rand(shape[0], -(-shape[1] // group), generator=generator) * 0.01 + 1e-3).half()
    scales[torch.rand(scales.shape, generator=generator) < 0.3] *= -1
    levels = torch.cat([torch.arange(-128, 0), torch.arange(1, 128)])
    levels = levels[torch.randperm(255, generator=generator)].to(torch.int8)
    if bits == 8:
        codebook, indices = None, levels[torch.randint(255, shape, generator=generator)]
        values = indices
    else:
        codebook, indices = levels[: 2**bits].clone(), torch.randint(2**bits, shape, generator=generator).byte()
        codebook[0], codebook[1] = -128, 127
        values = codebook[indices.long()]
    columns = scales.double().repeat_interleave(group, dim=1)[:, : shape[1]]
    dense = torch.where(mask, values.double() * columns, 0.0)
    return FewBitWeight.from_codes(indices, mask, scales, codebook, bits, group), dense
