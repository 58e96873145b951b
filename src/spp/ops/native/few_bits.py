"""The C++ kernels for weights whose survivors have a few bits: products with few tokens, and the dense weight.

Shapes: T tokens, O output features, I input features.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from spp.ops import native
from spp.ops.dtypes import KERNEL_DTYPE_NAMES, KERNEL_DTYPES
from spp.ops.few_bits import FewBitWeight, require_layout
from spp.ops.packed import DamagedWeightError

_BEST = -1


class _FewBitWeight(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "bitmask", "row_offsets", "scales", "codebook")),
        *((name, ctypes.c_int64) for name in ("code_bytes", "out_features", "in_features")),
        *((name, ctypes.c_int32) for name in ("bits", "group", "per_word", "unused")),
    ]


def why_not(weight: FewBitWeight, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute with this weight in this dtype, as a phrase; None if they can."""
    if native.why_not_loaded:
        return native.why_not_loaded
    if weight.device.type != "cpu":
        return f"it runs on the CPU, and the weight is on {weight.device}"
    if dtype not in KERNEL_DTYPES:
        return f"it computes in {KERNEL_DTYPE_NAMES}, and {dtype} is asked for"
    return None


def matvec(x: Tensor, weight: FewBitWeight, bias: Tensor | None, *, level: int = _BEST) -> Tensor:
    """As `few_bit_matmul.rounded_product`, reading each code once: (T, O) in x's dtype.

    Args:
        x: (T, I), contiguous; at most 4 tokens.
        weight: (O, I).
        bias: (O,) or None.
        level: see `native.instructions`.

    Raises:
        SppError: bitmask, row offsets and codes do not fit together.
    """
    library, described = _described(weight, x.dtype, level)
    tokens, in_features = x.shape
    native.require(in_features == weight.in_features and 1 <= tokens <= 4 and x.is_contiguous(), "x", x)
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    native.require(bias is None or bias.shape == (len(weight),), "bias", bias)
    count = ctypes.c_int64(tokens)
    rounded = torch.empty(library.spp_rounded_bytes(level, ctypes.byref(described), count), dtype=torch.uint8)
    y = torch.empty(tokens, len(weight), dtype=x.dtype)
    failed = library.spp_matvec_few(
        level,
        torch.get_num_threads(),
        ctypes.byref(described),
        ctypes.c_void_p(x.data_ptr()),
        KERNEL_DTYPES[x.dtype],
        count,
        None if bias is None else ctypes.c_void_p(bias.data_ptr()),
        ctypes.c_void_p(rounded.data_ptr()),
        ctypes.c_void_p(y.data_ptr()),
    )
    _require_sound(failed)
    return y


def expand(weight: FewBitWeight, out: Tensor, first: int = 0, *, level: int = _BEST) -> None:
    """The dense rows of W from `first` on, as many as `out` has, written to `out`; as `FewBitWeight.unpack`.

    Raises:
        SppError: bitmask, row offsets and codes do not fit together.
    """
    library, described = _described(weight, out.dtype, level)
    fits = out.shape[1:] == (weight.in_features,) and 0 <= first <= len(weight) - len(out) and out.is_contiguous()
    native.require(fits, "out", out)
    failed = library.spp_expand_few(
        level,
        torch.get_num_threads(),
        ctypes.byref(described),
        ctypes.c_void_p(out.data_ptr()),
        KERNEL_DTYPES[out.dtype],
        ctypes.c_int64(first),
        ctypes.c_int64(len(out)),
    )
    _require_sound(failed)


def _described(weight: FewBitWeight, dtype: torch.dtype, level: int) -> tuple[ctypes.CDLL, _FewBitWeight]:
    """The library, and the weight as its argument. Lengths are checked here; rows in C++."""
    if reason := why_not(weight, dtype):
        raise ValueError(f"the back-end native cannot be used: {reason}")
    library = native.library_for(level)
    require_layout(weight)
    described = _FewBitWeight(
        **{name: tensor.data_ptr() for name, tensor in weight.tensors().items()},
        code_bytes=len(weight.codes),
        out_features=len(weight),
        in_features=weight.in_features,
        bits=weight.bits,
        group=weight.group,
        per_word=weight.per_word,
    )
    return library, described


def _require_sound(failed: int) -> None:
    if failed:
        raise DamagedWeightError("a few-bit weight is damaged: its bitmask, row offsets and codes disagree")
