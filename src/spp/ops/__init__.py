"""The SPP operator behind one signature; the back-end is an argument.

`reference` is the formula by plain autograd, `torch` the same at the cost of three GEMMs. `auto` is `torch`, except
where the weight itself is trained, which only the reference differentiates.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from spp.ops import linear, reference

logger = logging.getLogger("spp")

Backend = Literal["auto", "reference", "torch"]
BACKENDS: dict[str, ModuleType] = {"reference": reference, "torch": linear}


def pick_backend(*, trains_weight: bool = False) -> str:
    """The back-end that `auto` stands for."""
    return "reference" if trains_weight else "torch"


def spp_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """y = x (W + s * W * A[g] * B)^T + bias (paper eq. 5), with W' rounded once to the dtype computed in.

    That dtype is autocast's where it is on, else W's; x is cast to it. So the result has the bits of the merged model.

    Args:
        x: (..., I).
        weight: (O, I), any float dtype; zeros stay zeros.
        A: (R, I), R <= O.
        B: (O, 1).
        scale: s.
        bias: (O,) or None.
        backend: one of `BACKENDS`, or auto.

    Returns:
        (..., O) in the dtype computed in.

    Raises:
        ValueError: shapes that do not fit, or a back-end that cannot do what is asked.
    """
    operator = _operator(x, weight, A, B, backend)
    return operator.spp_linear(_cast(x, weight), weight, A, B, scale, bias)


def adapter_linear(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float, *, backend: Backend = "auto"
) -> Tensor:
    """The adapter branch alone, x (s * W * A[g] * B)^T: for dropout on it, and for several adapters at once.

    Arguments, result and errors as for `spp_linear`.
    """
    operator = _operator(x, weight, A, B, backend)
    return operator.adapter_linear(_cast(x, weight), weight, A, B, scale)


def _operator(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, backend: str) -> ModuleType:
    out_features, in_features = weight.shape
    fits = x.shape[-1] == A.shape[-1] == in_features and B.shape == (out_features, 1) and 1 <= len(A) <= out_features
    if not fits:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in (("x", x), ("weight", weight), ("A", A), ("B", B)))
        raise ValueError(f"expected x (..., I), weight (O, I), A (R, I), B (O, 1) with R <= O; found {shapes}")
    if backend == "auto":
        backend = pick_backend(trains_weight=weight.requires_grad)
        _say_once(backend)
    if backend not in BACKENDS:
        raise ValueError(f"back-end {backend!r} is unknown; use auto, {', '.join(BACKENDS)}")
    if backend != "reference" and weight.requires_grad:
        raise ValueError(f"the back-end {backend} gives the weight no gradient; freeze it, or use reference")
    return BACKENDS[backend]


@cache
def _say_once(backend: str) -> None:
    logger.debug("SPP operator: back-end %s", backend)


def _cast(x: Tensor, weight: Tensor) -> Tensor:
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype)
