"""The float dtypes that weights may have, once: what each is called in files, and its number in the native kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class FloatFormat:
    """One float dtype.

    Attributes:
        safetensors: what safetensors files call it.
        native: its number in kernels.h; None where no kernel of ours, in C++ or Triton, computes with it.
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
"""Those that our kernels compute with -> their number in kernels.h."""


def dtype_name(dtype: torch.dtype) -> str:
    """What people call a dtype: `bfloat16`, not `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
