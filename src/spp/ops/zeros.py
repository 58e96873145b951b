"""What can be said of a tensor's numbers: zeros and their signs, NaN, infinity."""

from __future__ import annotations

import torch
from torch import Tensor

from spp.ops.dtypes import FLOATS


def is_float(tensor: Tensor) -> bool:
    """Whether a tensor holds weights in one of the dtypes that zeros can be proved in (fp16, bf16, fp32, fp64)."""
    return tensor.dtype in FLOATS


def canonical_zeros(tensor: Tensor) -> Tensor:
    """The same tensor with every -0.0 written as +0.0; all other bits, NaN payloads too, stay as they are.

    Engines that test a weight's bits for zero misread -0.0, and a fixed-count N:M packing breaks on it.
    """
    return torch.where(tensor == 0, torch.zeros((), dtype=tensor.dtype), tensor) if is_float(tensor) else tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity.

    The extremes are one of them if there is one, and finding those takes a tenth of the time of asking each number.
    """
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
