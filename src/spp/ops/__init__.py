"""The SPP operator: one function, with the back-end and the mode as arguments.

Back-ends: `reference` is the formula with plain autograd; `torch` computes it with three GEMMs, in plain torch;
`native` (CPU) and `triton` (GPU) use our kernels between the GEMMs. `auto` takes the fastest that supports the call.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from spp.ops import autograd, native, packed, packed_matmul, reference
from spp.ops.few_bit_matmul import few_bit_matmul as few_bit_matmul
from spp.ops.packed import PackedWeight, Weight

logger = logging.getLogger("spp")

Backend = Literal["auto", "reference", "torch", "native", "triton"]
Mode = Literal["fused", "split"]
BACKENDS: tuple[str, ...] = tuple(name for name in get_args(Backend) if name != "auto")


def spp_linear(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None = None,
    backend: Backend = "auto",
    *,
    mode: Mode = "fused",
) -> Tensor:
    """y = x (W + s * W * (A[g] B))^T + bias, the paper's eq. 5 where K = 1.

    The dtype to compute in is autocast's if autocast is on, else W's, and x is cast to it. With a packed weight it is
    x's own dtype, which may differ from that of the packed values.

    Args:
        x: (..., I).
        weight: (O, I), dense or packed, any float dtype; zeros stay zeros.
        A: (R K, I), R K <= O: K directions for each of R row groups, group after group.
        B: (O, K), K <= 16: coefficients by which each output row combines the directions of its group.
        scale: s.
        bias: (O,) or None.
        backend: one of `BACKENDS`, or auto.
        mode: "fused" rounds W' once to the dtype to compute in: three GEMMs a step, with the bits of the merged model.
            "split" adds x W^T and x Delta^T: four GEMMs, but updates too small to change a bf16 weight still count.

    Returns:
        (..., O) in the dtype that was computed in.

    Raises:
        ValueError: the shapes do not fit, or the back-end does not support the call.
    """
    _require_shapes(x, weight, A, B, bias)
    if mode not in get_args(Mode):
        raise ValueError(f"mode {mode!r} is unknown; use {' or '.join(get_args(Mode))}")
    x = _cast(x, weight)
    chosen = _resolve(backend, x, weight)
    if chosen == "reference":
        return reference.spp_linear(x, weight, A, B, scale, bias, mode=mode)
    return autograd.apply(x, weight, A, B, scale, bias, mode, chosen)


def adapter_linear(x: Tensor, weight: Weight, A: Tensor, B: Tensor, scale: float, backend: Backend = "auto") -> Tensor:
    """The adapter branch alone, x (s * W * (A[g] B))^T: for dropout on it, and for several adapters at once.

    Arguments, result and errors as for `spp_linear`.
    """
    _require_shapes(x, weight, A, B)
    x = _cast(x, weight)
    chosen = _resolve(backend, x, weight)
    if chosen == "reference":
        return reference.adapter_linear(x, weight, A, B, scale)
    return autograd.apply(x, weight, A, B, scale, None, "adapter", chosen)


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """y = x W^T + bias for a packed W (O, I) without an adapter; the values of W may be trained.

    Arguments, result and errors as for `spp_linear`.
    """
    packed.require_layout(weight)
    _require_bias(bias, weight)
    _require_float("x", x)
    if x.shape[-1:] != (weight.in_features,):
        raise ValueError(f"expected x (..., {weight.in_features}) for a weight {weight.shape}; found {tuple(x.shape)}")
    x = _cast(x, weight)
    frozen = replace(weight, values=weight.values.detach()) if weight.requires_grad else weight
    chosen = _resolve(backend, x, frozen)  # every back-end gives the values their gradient here
    if chosen == "reference":
        return reference.packed_linear(x, weight, bias)
    return packed_matmul.apply(x, weight, bias, chosen)


@torch.no_grad()
def merged_weight(weight: Weight, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """W' = W + s * W * (A[g] B), the paper's eq. 5 where K = 1: rounded once; +0.0 where W is zero.

    The bits are those of `reference.merged_weight`, except in NaN payloads; no memory is needed besides the result.

    Args:
        weight: (O, I), dense or packed, any float dtype.
        A: (R K, I).
        B: (O, K).
        scale: s.
        dtype: dtype of the result; by default W's.

    Returns:
        (O, I).

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    _require_shapes(A, weight, A, B)  # A in the place of x, which there is none of
    wide = reference.wide_dtype(weight, A, B)
    out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    kernels = autograd.kernels_of((_accelerated(weight, out) if wide == torch.float32 else None) or "torch")
    kernels.effective_weight(weight, A.to(wide).contiguous(), scale * B.to(wide), out, with_base=True)
    return out


def pack(weight: Tensor) -> PackedWeight:
    """Pack a weight (O, I), leaving out its zeros; see `spp.ops.packed`.

    Raises:
        ValueError: it is not a matrix, or not of a float dtype.
    """
    packed.require_packable(weight)
    return (packed if native.why_not(weight) else native).pack(weight)


def unpack(weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight (O, I): in its own dtype with the bits that were packed, or in `dtype`; +0.0 elsewhere.

    Raises:
        SppError: the packed weight is damaged.
    """
    packed.require_layout(weight)
    out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    autograd.kernels_of(_accelerated(weight, out) or "torch").expand(weight, out)
    return out


def packs_well(device: torch.device) -> bool:
    """Whether packed weights are fast on a device, that is, whether our kernels can be used there."""
    return _accelerated(torch.empty(1, 1, device=device)) is not None


def why_not(backend: str, weight: Weight, *others: Tensor) -> str | None:
    """Why a back-end cannot compute with this weight and these other tensors, as a phrase; None if it can."""
    if weight.requires_grad and backend != "reference":
        return "it gives the weight no gradient; freeze it, or use reference"
    if backend == "native":
        return native.why_not(weight, *others)
    if backend == "triton":
        from spp.ops import triton_kernels  # slow to import, and most machines never need it

        return triton_kernels.why_not(weight, *others)
    return None


def _accelerated(weight: Weight, *others: Tensor) -> str | None:
    """The name of the back-end with our kernels for these tensors, if there is one."""
    backend = "triton" if weight.device.type == "cuda" else "native"
    return backend if why_not(backend, weight, *others) is None else None


def _resolve(backend: str, x: Tensor, weight: Weight) -> str:
    """The name of the back-end to use for these arguments.

    Raises:
        ValueError: an explicit back-end is unknown, or does not support them.
    """
    if backend == "auto":
        backend = "reference" if weight.requires_grad else _accelerated(weight, x) or "torch"
        if not torch.compiler.is_compiling():
            _say_once(backend)
        return backend
    if backend not in BACKENDS:
        raise ValueError(f"back-end {backend!r} is unknown; use auto, {', '.join(BACKENDS)}")
    if reason := why_not(backend, weight, x):
        raise ValueError(f"the back-end {backend} cannot be used: {reason}")
    return backend


@cache
def _say_once(backend: str) -> None:
    logger.debug("SPP operator: back-end %s", backend)


def _require_shapes(x: Tensor, weight: Weight, A: Tensor, B: Tensor, bias: Tensor | None = None) -> None:
    """Check shapes, dtypes and devices, which costs microseconds whatever the sizes.

    Raises:
        ValueError: names what does not fit.
    """
    if isinstance(weight, PackedWeight):
        packed.require_layout(weight)
    named = {"x": x, "weight": weight, "A": A, "B": B}
    shape = weight.shape
    fits = len(shape) == A.ndim == B.ndim == 2 and x.ndim > 0 and len(B) == shape[0]
    fits = fits and x.shape[-1] == A.shape[-1] == shape[1]
    directions = B.shape[1] if fits else 0
    if not 1 <= directions <= min(len(A), reference.MOST_DIRECTIONS) or len(A) > shape[0] or len(A) % directions:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in named.items())
        raise ValueError(
            "expected x (..., I), weight (O, I), A (R K, I), B (O, K) with R K <= O, "
            f"K <= {reference.MOST_DIRECTIONS}; found {shapes}"
        )
    for name, tensor in named.items():
        _require_float(name, tensor)
    _require_bias(bias, weight)
    if not x.device == weight.device == A.device == B.device:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in named.items())
        raise ValueError(f"expected all tensors on one device; found {places}")


def _require_float(name: str, tensor: Weight) -> None:
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} is {tensor.dtype}, and a float dtype is expected")


def _require_bias(bias: Tensor | None, weight: Weight) -> None:
    if bias is not None and (tuple(bias.shape) != (len(weight),) or not bias.dtype.is_floating_point):
        raise ValueError(f"expected a bias ({len(weight)},) of floats; found {tuple(bias.shape)} {bias.dtype}")


def _cast(x: Tensor, weight: Weight) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x.to(weight.dtype) if isinstance(weight, Tensor) else x
