"""The SPP operator at its floor of three GEMMs, saving nothing of the weight's size between forward and backward.

Forward: y = x W'^T (1). Backward: dX = dY W' (2), G = dY^T x (3), and element-wise reductions of P = G * W:

    dB[i]    = s * sum_j P[i, j] * A[g(i), j]
    dA[k, j] = s * sum_{i in group k} P[i, j] * B[i]

W' is formed again in backward, and G in blocks of rows that are reduced at once. Rows are walked in pieces that lie in
one group, so that A needs no gather, and that are small enough for the CPU's cache.

Shapes: T tokens, O output features, I input features, R row groups. x (..., I), W (O, I), A (R, I), B (O, 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spp.ops.reference import wide_dtype

_PIECE_ROWS = 128
_BLOCK_ROWS = 1024


def spp_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """y = x W'^T + bias, (..., O). Arguments as for `reference.spp_linear`; W gets no gradient."""
    if bias is not None:
        bias = bias.to(x.dtype)
    return _apply(x, weight, A, B, scale, bias, with_base=True)


def adapter_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The adapter branch alone, x Delta^T, (..., O). Arguments as for `spp_linear`."""
    return _apply(x, weight, A, B, scale, None, with_base=False)


def _apply(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float, bias: Tensor | None, *, with_base: bool
) -> Tensor:
    # Shaped outside: autograd lets nobody change a view in place that a function returned, and some models do that.
    rows = cast(Tensor, _Spp.apply(x.reshape(-1, x.shape[-1]), weight, A, B, scale, bias, with_base))
    return rows.reshape(*x.shape[:-1], len(weight))


class _Spp(torch.autograd.Function):
    """x (c W + Delta)^T + bias with c = 1 (`with_base`) or 0, for x (T, I)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float, bias: Tensor | None, with_base: bool
    ) -> Tensor:
        # The parameters themselves: a cast or a copy would keep one more weight alive until backward.
        ctx.save_for_backward(x, weight, A, B)
        ctx.scale, ctx.with_base = scale, with_base
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, effective_weight(weight, A, B, scale, x.dtype, with_base=with_base), bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        needs_x, _, needs_A, needs_B, _, needs_bias, _ = ctx.needs_input_grad
        dy = grads[0].to(x.dtype)
        dx = dA = dB = None
        with torch.autocast(x.device.type, enabled=False):
            if needs_x:
                dx = dy @ effective_weight(weight, A, B, ctx.scale, x.dtype, with_base=ctx.with_base)
            if needs_A or needs_B:
                dA, dB = _factor_gradients(dy, x, weight, A, B, ctx.scale)
        return dx, None, dA, dB, None, dy.sum(dim=0) if needs_bias else None, None


def effective_weight(
    weight: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype, *, with_base: bool
) -> Tensor:
    """c W + Delta, (O, I), in `wide_dtype` piece by piece and rounded once to `dtype`; the merge's bits for c = 1."""
    wide = wide_dtype(weight, A, B)
    effective = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    A, scaled_B = A.detach().to(wide), scale * B.detach().to(wide)
    for block in _blocks(len(weight), len(A)):
        for group, rows in block:
            part = weight[rows].detach().to(wide)
            delta = part * (A[group] * scaled_B[rows])
            total = delta.add_(part) if with_base else delta
            effective[rows] = total.masked_fill_(part == 0, 0.0)
    return effective


def _factor_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """dA (R, I) and dB (O, 1) from dY (T, O) and x (T, I)."""
    wide = wide_dtype(weight, A, B)
    wide_A, wide_B = A.detach().to(wide), B.detach().to(wide)
    dA, dB = torch.zeros_like(wide_A), torch.empty_like(wide_B)
    for block in _blocks(len(weight), len(A)):
        first, last = block[0][1].start, block[-1][1].stop
        G = dy[:, first:last].T @ x
        for group, rows in block:
            part = weight[rows].detach()
            # A zero of W takes no part, even where G is not finite.
            P = G[rows.start - first : rows.stop - first].to(wide).mul_(part).masked_fill_(part == 0, 0.0)
            torch.mv(P, wide_A[group], out=dB[rows, 0])
            dA[group].addmv_(P.T, wide_B[rows, 0])
    return dA.mul_(scale).to(A.dtype), dB.mul_(scale).to(B.dtype)


def _blocks(out_features: int, rank: int) -> Iterator[list[tuple[int, slice]]]:
    """All rows in order, as blocks of up to 1,024 rows: lists of (group, rows), the rows of each in one group."""
    block: list[tuple[int, slice]] = []
    for group in range(rank):
        # The first i with floor(i * R / O) = group is ceil(group * O / R).
        start, end = (-(-edge * out_features // rank) for edge in (group, group + 1))
        for piece in range(start, end, _PIECE_ROWS):
            rows = slice(piece, min(piece + _PIECE_ROWS, end))
            if block and rows.stop - block[0][1].start > _BLOCK_ROWS:
                yield block
                block = []
            block.append((group, rows))
    yield block
