"""The SPP operator with the fewest GEMMs possible; it saves only its arguments between forward and backward.

    forward     fused: y = x W'^T (1)                  split: y = x W^T + x Delta^T (2)
    backward    dX = dY W' (1)
                G = dY^T x (1), then reductions of P = G * W, with d = K g(i) + k:
                    dB[i, k] = s * sum_j P[i, j] * A[d, j]
                    dA[d, j] = s * sum_{i in group} P[i, j] * B[i, k]

W' is formed again in backward; G is computed in blocks of rows, each of which is reduced immediately. Both use scratch
memory that layers share. Under torch.compile and with fake tensors these are custom ops, which are opaque: the compiler
cannot form W' only once and keep it until backward. Eager code calls the functions directly, because a custom op costs
0.1 ms or more by itself.

Shapes: T tokens, O output features, I input features, R row groups, K directions. x (T, I), W (O, I), A (R K, I),
B (O, K).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spp.ops.packed import PackedWeight, Weight
from spp.ops.reference import wide_dtype
from spp.ops.scratch import scratch

Part = Literal["fused", "split", "adapter"]
"""What is computed: x W'^T with W' rounded once; the same as two products; or the adapter's product x Delta^T alone."""

_GPU_BLOCK = 2**26  # entries of G in a block: all of G, except in the largest layers

_MODULES = {"torch": "spp.ops.torch_kernels", "native": "spp.ops.native", "triton": "spp.ops.triton_kernels"}


def apply(
    x: Tensor, weight: Weight, A: Tensor, B: Tensor, scale: float, bias: Tensor | None, part: Part, backend: str
) -> Tensor:
    """x (c W + Delta)^T + bias, (..., O) in x's dtype, for x (..., I); gradients for x, A, B and bias.

    Args:
        x: (..., I) in the dtype to compute in.
        weight: (O, I); gets no gradient.
        A, B, scale, bias: as for `spp.ops.spp_linear`.
        part: see `Part`.
        backend: torch, native or triton.
    """
    if bias is not None:
        bias = bias.to(x.dtype)
    linear: Any = _linear_op
    if type(x) is Tensor and not torch.compiler.is_compiling():
        linear = _Linear.apply if torch.is_grad_enabled() else _linear
    # Reshaped outside of the op: a view that an op returns may not be changed in place, which some models do.
    rows = linear(x.reshape(-1, x.shape[-1]), as_tensors(weight), A, B, scale, bias, part, backend)
    return rows.reshape(*x.shape[:-1], len(weight))


def kernels_of(backend: str) -> ModuleType:
    """The module of a back-end; it has the functions of `spp.ops.torch_kernels`."""
    return import_module(_MODULES[backend])  # late: triton is slow to import


def scratch_bytes(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of scratch memory that the forward and backward of a layer use: W', and a block of G."""
    rows = _block_rows(out_features, in_features, device)
    return (out_features + min(out_features, rows)) * in_features * dtype.itemsize


def _block_rows(out_features: int, in_features: int, device: torch.device) -> int:
    """Rows of a block of G: enough for an efficient GEMM, few beside W'; on a GPU more, for fewer launches."""
    if device.type != "cpu":
        return max(_GPU_BLOCK // max(in_features, 1), 128)
    return min(1024, max(128, out_features // 8))


def as_tensors(weight: Weight) -> list[Tensor]:
    """A weight as the ops take it: one dense tensor, or the three of a packed weight."""
    return [weight] if isinstance(weight, Tensor) else [weight.values, weight.bitmask, weight.row_offsets]


def _linear(
    x: Tensor, weight: list[Tensor], A: Tensor, B: Tensor, scale: float, bias: Tensor | None, part: str, backend: str
) -> Tensor:
    with exactly(x):
        if part != "split":
            return F.linear(x, _effective(x.dtype, weight, A, B, scale, part == "fused", backend), bias)
        whole = _whole(weight, A)
        base = whole.to(x.dtype) if isinstance(whole, Tensor) else expanded(whole, x.dtype, backend)
        y = F.linear(x, base, bias)
        return torch.addmm(y, x, _effective(x.dtype, weight, A, B, scale, False, backend).T, out=y)


def _input_gradient(
    dy: Tensor, weight: list[Tensor], A: Tensor, B: Tensor, scale: float, part: str, backend: str
) -> Tensor:
    with exactly(dy):
        return dy @ _effective(dy.dtype, weight, A, B, scale, part != "adapter", backend)


def _factor_gradients(
    dy: Tensor, x: Tensor, weight: list[Tensor], A: Tensor, B: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    whole = _whole(weight, A)
    wide = wide_dtype(whole, A, B)
    wide_A, wide_B = A.to(wide).contiguous(), B.to(wide).contiguous()
    dA, dB = torch.zeros_like(wide_A), torch.zeros_like(wide_B)
    with exactly(x):
        for first, G in gradient_blocks(dy, x):
            kernels_of(backend).add_factor_gradients(G, first, whole, wide_A, wide_B, dA, dB)
    return dA.mul_(scale).to(A.dtype), dB.mul_(scale).to(B.dtype)


def gradient_blocks(dy: Tensor, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """dY^T x, (O, I) in x's dtype, in blocks of rows: the first row of each block, and the block in scratch memory.

    Args:
        dy: (T, O) in x's dtype.
        x: (T, I).
    """
    out_features, in_features = dy.shape[1], x.shape[1]
    block = _block_rows(out_features, in_features, x.device)
    for first in range(0, out_features if len(x) else 0, block):
        rows = dy[:, first : first + block].T
        G = scratch("gradient", (len(rows), in_features), x.dtype, x.device)
        yield first, torch.mm(rows, x, out=G)


_linear_op = torch.library.custom_op("spp::linear", _linear, mutates_args=())
_input_gradient_op = torch.library.custom_op("spp::input_gradient", _input_gradient, mutates_args=())
_factor_gradients_op = torch.library.custom_op("spp::factor_gradients", _factor_gradients, mutates_args=())


@_linear_op.register_fake
def _(
    x: Tensor, weight: list[Tensor], A: Tensor, B: Tensor, scale: float, bias: Tensor | None, part: str, backend: str
) -> Tensor:
    return x.new_empty(len(x), len(B))


@_input_gradient_op.register_fake
def _(dy: Tensor, weight: list[Tensor], A: Tensor, B: Tensor, scale: float, part: str, backend: str) -> Tensor:
    return dy.new_empty(len(dy), A.shape[1])


@_factor_gradients_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: list[Tensor], A: Tensor, B: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(A), torch.empty_like(B)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, A, B, scale, _, part, backend = inputs
    # The parameters themselves are saved: a cast or a copy would keep another weight in memory until backward.
    ctx.save_for_backward(x, A, B, *weight)
    ctx.scale, ctx.part, ctx.backend = scale, part, backend


def _backward(
    input_gradient: Callable[..., Tensor], factor_gradients: Callable[..., tuple[Tensor, Tensor]], ctx: Any, dy: Tensor
) -> tuple[Any, ...]:
    x, A, B, *weight = ctx.saved_tensors
    needs_x, _, needs_A, needs_B, _, needs_bias, *_ = ctx.needs_input_grad
    dy = dy.to(x.dtype).contiguous()
    dx = dA = dB = None
    if needs_x:
        dx = input_gradient(dy, weight, A, B, ctx.scale, ctx.part, ctx.backend)
    if needs_A or needs_B:
        dA, dB = factor_gradients(dy, x, weight, A, B, ctx.scale, ctx.backend)
    return dx, [None] * len(weight), dA, dB, None, dy.sum(dim=0) if needs_bias else None, None, None


torch.library.register_autograd(
    "spp::linear", partial(_backward, _input_gradient_op, _factor_gradients_op), setup_context=_save
)


class _Linear(torch.autograd.Function):
    """The operator for eager code, without the custom ops."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _linear(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx, _, *others = _backward(_input_gradient, _factor_gradients, ctx, *gradients)
        return dx, None, *others


def exactly(x: Tensor) -> AbstractContextManager[Any]:
    """Context manager that turns autocast off: products are computed in the dtypes of their arguments."""
    device = x.device.type
    # Turning it off costs as much as a launch, so only if it is on.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _effective(
    dtype: torch.dtype, weight: list[Tensor], A: Tensor, B: Tensor, scale: float, with_base: bool, backend: str
) -> Tensor:
    """c W + Delta, (O, I), rounded once to `dtype`, in scratch memory."""
    whole = _whole(weight, A)
    wide = wide_dtype(whole, A, B)
    out = scratch("weight", whole.shape, dtype, A.device)
    kernels_of(backend).effective_weight(whole, A.to(wide).contiguous(), scale * B.to(wide), out, with_base=with_base)
    return out


def expanded(weight: PackedWeight, dtype: torch.dtype, backend: str) -> Tensor:
    """A packed W (O, I) in `dtype`, in scratch memory."""
    out = scratch("weight", weight.shape, dtype, weight.device)
    kernels_of(backend).expand(weight, out)
    return out


def _whole(weight: list[Tensor], A: Tensor) -> Weight:
    return weight[0] if len(weight) == 1 else PackedWeight(*weight, in_features=A.shape[1])
