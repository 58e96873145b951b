"""The product with a packed weight: by our own kernel for few tokens, by expanding W for more.

For few tokens, reading the weight takes most of the time, and our kernel reads only its non-zeros. For more, W is
expanded into scratch memory and multiplied by torch.

Shapes: T tokens, O output features, I input features. x (T, I), W (O, I).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spp.ops import native
from spp.ops.autograd import expanded
from spp.ops.packed import PackedWeight

_PART_BYTES = 5 * 2**17  # of x: leaves room for the rest in a CPU's L2 cache


def apply(x: Tensor, weight: PackedWeight, bias: Tensor | None, backend: str) -> Tensor:
    """y = x W^T + bias, (..., O) in x's dtype, for x (..., I); gradients for x and bias.

    Args:
        x: (..., I) in the dtype to compute in.
        weight: (O, I).
        bias: (O,) or None.
        backend: torch, native or triton.
    """
    if bias is not None:
        bias = bias.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    if type(x) is Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        rows = _multiply(rows, weight, bias, backend)  # a custom op's own time would count beside few tokens
    else:
        tensors = (weight.values, weight.bitmask, weight.row_offsets)
        rows = _packed_linear(rows, *tensors, bias, weight.in_features, backend)
    return rows.reshape(*x.shape[:-1], len(weight))


@torch.library.custom_op("spp::packed_linear", mutates_args=())
def _packed_linear(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor,
    bias: Tensor | None,
    in_features: int,
    backend: str,
) -> Tensor:
    return _multiply(x, PackedWeight(values, bitmask, row_offsets, in_features), bias, backend)


def _multiply(x: Tensor, weight: PackedWeight, bias: Tensor | None, backend: str) -> Tensor:
    if backend == "native":
        parts = -(-len(x) // native.most_tokens(weight, x.dtype))
        fits = x.nbytes <= parts * _PART_BYTES
        if parts == 1 or (1 < parts <= _most_parts(x.dtype) and fits):
            ys = [native.matvec(part, weight, bias) for part in x.contiguous().tensor_split(parts)]
            return ys[0] if parts == 1 else torch.cat(ys)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, expanded(weight, x.dtype, backend), bias)


def _most_parts(dtype: torch.dtype) -> int:
    """How often the packed weight may be read, each time for a part of the tokens, before torch's product is faster.

    What that costs more is to write W, expanded, and to read it again: the bytes of an entry.
    """
    return dtype.itemsize


@torch.library.custom_op("spp::packed_input_gradient", mutates_args=())
def _packed_input_gradient(
    dy: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, in_features: int, backend: str
) -> Tensor:
    with torch.autocast(dy.device.type, enabled=False):
        return dy @ expanded(PackedWeight(values, bitmask, row_offsets, in_features), dy.dtype, backend)


@_packed_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor,
    bias: Tensor | None,
    in_features: int,
    backend: str,
) -> Tensor:
    return x.new_empty(len(x), len(bitmask))


@_packed_input_gradient.register_fake
def _(dy: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, in_features: int, backend: str) -> Tensor:
    return dy.new_empty(len(dy), in_features)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bitmask, row_offsets, _, in_features, backend = inputs
    ctx.save_for_backward(values, bitmask, row_offsets)  # W is frozen, so x is not needed in backward
    ctx.dtype, ctx.in_features, ctx.backend = x.dtype, in_features, backend


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dy = dy.to(ctx.dtype).contiguous()
    needs_x, _, _, _, needs_bias, *_ = ctx.needs_input_grad
    dx = _packed_input_gradient(dy, *ctx.saved_tensors, ctx.in_features, ctx.backend) if needs_x else None
    return dx, None, None, None, dy.sum(dim=0) if needs_bias else None, None, None


torch.library.register_autograd("spp::packed_linear", _backward, setup_context=_save)
