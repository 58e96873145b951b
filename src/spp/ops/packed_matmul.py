"""The product with a packed weight: by our own kernel for few tokens, by expanding W for more.

For few tokens, reading the weight takes most of the time, and our kernel reads only its non-zeros. For more, W is
expanded into scratch memory and multiplied by torch.

The values of W may be trained. Their gradient is that of the dense W, dY^T x, at the entries that are stored: it is
formed in blocks of rows, of which each is compressed at once, so nothing of the dense weight's size is kept.

Shapes: T tokens, O output features, I input features. x (T, I), W (O, I).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spp.ops import native
from spp.ops.autograd import exactly, expanded, gradient_blocks, kernels_of
from spp.ops.packed import PackedWeight

_PART_BYTES = 5 * 2**17  # of x: leaves room for the rest in a CPU's L2 cache


def apply(x: Tensor, weight: PackedWeight, bias: Tensor | None, backend: str) -> Tensor:
    """y = x W^T + bias, (..., O) in x's dtype, for x (..., I); gradients for x, the values of W, and bias.

    Args:
        x: (..., I) in the dtype to compute in.
        weight: (O, I).
        bias: (O,) or None.
        backend: torch, native or triton.
    """
    if bias is not None:
        bias = bias.to(x.dtype)
    linear: Any = _packed_linear_op
    if type(x) is Tensor and not torch.compiler.is_compiling():
        # A custom op's own time would count beside few tokens.
        linear = _PackedLinear.apply if torch.is_grad_enabled() else _packed_linear
    tensors = (weight.values, weight.bitmask, weight.row_offsets)
    rows = linear(x.reshape(-1, x.shape[-1]), *tensors, bias, weight.in_features, backend)
    return rows.reshape(*x.shape[:-1], len(weight))


def _packed_linear(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor,
    bias: Tensor | None,
    in_features: int,
    backend: str,
) -> Tensor:
    weight = PackedWeight(values, bitmask, row_offsets, in_features)
    if backend == "native":
        parts = -(-len(x) // native.most_tokens(weight, x.dtype))
        fits = x.nbytes <= parts * _PART_BYTES
        if parts == 1 or (1 < parts <= _most_parts(x.dtype) and fits):
            ys = [native.matvec(part, weight, bias) for part in x.contiguous().tensor_split(parts)]
            return ys[0] if parts == 1 else torch.cat(ys)
    with exactly(x):
        return F.linear(x, expanded(weight, x.dtype, backend), bias)


def _most_parts(dtype: torch.dtype) -> int:
    """How often the packed weight may be read, each time for a part of the tokens, before torch's product is faster.

    What that costs more is to write W, expanded, and to read it again: the bytes of an entry.
    """
    return dtype.itemsize


def _input_gradient(
    dy: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, in_features: int, backend: str
) -> Tensor:
    with exactly(dy):
        return dy @ expanded(PackedWeight(values, bitmask, row_offsets, in_features), dy.dtype, backend)


def _value_gradient(
    dy: Tensor, x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, backend: str
) -> Tensor:
    """dY^T x at the entries of W that are stored, as `values`: computed in x's dtype, kept in that of the values."""
    gradient = torch.zeros_like(values)
    weight = PackedWeight(gradient, bitmask, row_offsets, x.shape[1])
    with exactly(x):
        for first, G in gradient_blocks(dy, x):
            kernels_of(backend).compress(G, first, weight)
    return gradient


_packed_linear_op = torch.library.custom_op("spp::packed_linear", _packed_linear, mutates_args=())
_input_gradient_op = torch.library.custom_op("spp::packed_input_gradient", _input_gradient, mutates_args=())
_value_gradient_op = torch.library.custom_op("spp::packed_value_gradient", _value_gradient, mutates_args=())


@_packed_linear_op.register_fake
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


@_input_gradient_op.register_fake
def _(dy: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, in_features: int, backend: str) -> Tensor:
    return dy.new_empty(len(dy), in_features)


@_value_gradient_op.register_fake
def _(dy: Tensor, x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, backend: str) -> Tensor:
    return torch.empty_like(values)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bitmask, row_offsets, _, in_features, backend = inputs
    # x is needed in backward only if W is trained.
    ctx.save_for_backward(values, bitmask, row_offsets, *([x] if values.requires_grad else []))
    ctx.dtype, ctx.in_features, ctx.backend = x.dtype, in_features, backend


def _backward(
    input_gradient: Callable[..., Tensor], value_gradient: Callable[..., Tensor], ctx: Any, dy: Tensor
) -> tuple[Any, ...]:
    values, bitmask, row_offsets, *saved = ctx.saved_tensors
    needs_x, needs_values, _, _, needs_bias, *_ = ctx.needs_input_grad
    dy = dy.to(ctx.dtype).contiguous()
    weight, dx, dvalues = (values, bitmask, row_offsets), None, None
    if needs_x:
        dx = input_gradient(dy, *weight, ctx.in_features, ctx.backend)
    if needs_values:
        dvalues = value_gradient(dy, *saved, *weight, ctx.backend)
    return dx, dvalues, None, None, dy.sum(dim=0) if needs_bias else None, None, None


torch.library.register_autograd(
    "spp::packed_linear", partial(_backward, _input_gradient_op, _value_gradient_op), setup_context=_save
)


class _PackedLinear(torch.autograd.Function):
    """The product for eager code, without the custom ops."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _packed_linear(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _backward(_input_gradient, _value_gradient, ctx, *gradients)
