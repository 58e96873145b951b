"""Zeros and their signs, NaN and infinity in a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spp.ops.dtypes import FLOATS

SPARSE_FROM = 0.01
"""Share of zeros from which weights count as pruned; below, they are dense but for a few zeros by chance."""

# Every number of these is one in fp32, and of those one in fp64.
_BYTES = {torch.bool, torch.int8, torch.uint8, torch.int16, torch.uint16} | {
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu
}  # fmt: skip
_INTEGERS = {torch.int32, torch.uint32, torch.int64, torch.uint64}


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


def exactly_wider(tensor: Tensor) -> Tensor | None:
    """The same numbers in a dtype of `is_float`; None for complex numbers, and for codes of several values in a byte.

    fp8 and integers become floats that hold them, their zeros and the zeros' signs exactly (of integers of more than
    53 bits, all but the last digits).
    """
    if tensor.dtype in FLOATS:
        return tensor
    if tensor.dtype in _BYTES:
        return tensor.float()
    return tensor.double() if tensor.dtype in _INTEGERS else None


def count_non_finite(tensor: Tensor) -> int:
    """How many entries of a float tensor are NaN or infinite; none of any other tensor."""
    wide = exactly_wider(tensor) if tensor.dtype.is_floating_point else None
    if wide is None or all_finite(wide):
        return 0
    return int((~torch.isfinite(wide)).count_nonzero())


def share_of_zeros(weights: Sequence[Tensor], *, up_to: float = 1.0) -> float:
    """Share of the entries that are zero; or at least `up_to` where there are more, which saves reading the rest."""
    entries = max(sum(weight.numel() for weight in weights), 1)
    zeros = 0
    for weight in weights:
        zeros += int((weight == 0).count_nonzero())
        if zeros >= up_to * entries:
            break
    return zeros / entries


def is_sparse(weights: Sequence[Tensor]) -> bool:
    """Whether at least `SPARSE_FROM` of the entries are zero."""
    return share_of_zeros(weights, up_to=SPARSE_FROM) >= SPARSE_FROM
