"""The float dtypes of weights: the name of each in safetensors files, and its number in the native kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class FloatFormat:
    """One float dtype.

    Attributes:
        safetensors: its name in safetensors files.
        native: its number in kernels.h; None if none of our kernels, in C++ or Triton, supports it.
    """

    safetensors: str
    native: int | None


FLOATS = {
    torch.bfloat16: FloatFormat(safetensors="BF16", native=0),
    torch.float16: FloatFormat(safetensors="F16", native=1),
    torch.float32: FloatFormat(safetensors="F32", native=2),
    torch.float64: FloatFormat(safetensors="F64", native=None),
}

KERNEL_DTYPES = {dtype: one.native for dtype, one in FLOATS.items() if one.native is not None}
"""Dtypes that our kernels support -> their number in kernels.h."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without its module: `bfloat16`, not `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


KERNEL_DTYPE_NAMES = ", ".join(map(dtype_name, KERNEL_DTYPES))
"""Those dtypes as a phrase, for messages."""

SCALE_DTYPE = torch.float16
"""Dtype of the scales of few-bit weights; `Scale` in native/dtypes.h."""
