"""The SPP formula in readable form: the reference for every faster implementation and for the merge.

    Delta[i, j] = s * W[i, j] * sum_k A[K g(i) + k, j] * B[i, k]        g(i) = floor(i * R / O)
    W'          = W + Delta

The rows are divided into R groups. The rows of a group share K directions, rows of A, and each combines them by its
own coefficients in B. With K = 1 this is the paper's eq. 5, Delta[i, j] = s * W[i, j] * A[g(i), j] * B[i]; with R = 1
it is HiRA of rank K.

Zeros of W are +0.0 in Delta and in W', whatever A and B hold. All of it is computed in fp32 (fp64 where an argument is
fp64) and rounded once.

Shapes: T tokens, O output features, I input features, R row groups, K directions. x (..., I), W (O, I), A (R K, I),
B (O, K).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from spp.ops.packed import PackedWeight, Weight, unpack, unpack_mask

MOST_DIRECTIONS = 16
"""The largest K; equal to kMostDirections of the native kernels."""


def row_groups(out_features: int, groups: int, device: torch.device | None = None) -> Tensor:
    """g(i) = floor(i * R / O) of every output row, (O,) int64.

    If R divides O these are the paper's groups of O / R consecutive rows; else their sizes differ by at most one.
    """
    return torch.arange(out_features, device=device) * groups // out_features


def fitting_groups(out_features: int, groups: int, directions: int) -> tuple[int, int]:
    """R and K of a layer: those asked for, or less if the layer, such as a router, has too few rows for them."""
    groups = min(groups, out_features)
    return groups, min(directions, out_features // groups)


def one_direction_each(out_features: int, groups: int, directions: int, device: torch.device | None = None) -> Tensor:
    """A B (O, K) int64 with a single 1 per row: each group is divided into K equal parts, part k has it in column k."""
    own = row_groups(out_features, groups * directions, device) - directions * row_groups(out_features, groups, device)
    return torch.nn.functional.one_hot(own, directions)


def wide_dtype(*tensors: Weight) -> torch.dtype:
    """The dtype that the formula is computed in: fp32, or fp64 if any argument is fp64."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def delta_weight(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Delta = s * W * (A[g] B), (O, I) in `wide_dtype`; +0.0 where W is zero.

    Args:
        weight: (O, I), any float dtype.
        A: (R K, I).
        B: (O, K).
        scale: s.
    """
    wide = wide_dtype(weight, A, B)
    weight = weight.to(wide)
    directions = B.shape[1]
    first = directions * row_groups(len(weight), len(A) // directions, weight.device)
    multiplier = mixture([A.to(wide)[first + k] for k in range(directions)], scale * B.to(wide))
    # Not the bare product: it is -0.0 where the multiplier is negative, and NaN where it overflows.
    return torch.where(weight == 0, 0.0, weight * multiplier)


def mixture(directions: Sequence[Tensor], B: Tensor) -> Tensor:
    """sum_k directions[k] * B[:, k], (n, I), summed in the order of k, so that its bits are fixed.

    Args:
        directions: K of them, (n, I) or (I,) each.
        B: (n, K).
    """
    total = directions[0] * B[:, :1]
    for k in range(1, len(directions)):
        total = total + directions[k] * B[:, k : k + 1]
    return total


def add_delta(weight: Tensor, delta: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """W + Delta, (O, I), rounded once to W's dtype, or to another; +0.0 where W is zero."""
    return torch.where(weight == 0, 0.0, weight.to(delta.dtype) + delta).to(dtype or weight.dtype)


def merged_weight(weight: Tensor, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """W' = W + s * W * (A[g] B), (O, I) in W's dtype, or in another. Arguments as for `delta_weight`."""
    return add_delta(weight, delta_weight(weight, A, B, scale), dtype)


def spp_linear(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None = None,
    *,
    mode: Literal["fused", "split"] = "fused",
) -> Tensor:
    """y = x W'^T + bias, (..., O), by plain autograd.

    Args:
        x: (..., I).
        weight, A, B, scale: as for `delta_weight`; W may be packed, and W' is rounded once to x's dtype.
        bias: (O,) or None.
        mode: "split" adds x W^T and x Delta^T instead.
    """
    weight = dense(weight)
    bias = None if bias is None else bias.to(x.dtype)
    if mode == "split":
        return F.linear(x, weight.to(x.dtype), bias) + adapter_linear(x, weight, A, B, scale)
    return F.linear(x, merged_weight(weight, A, B, scale, x.dtype), bias)


def adapter_linear(x: Tensor, weight: Weight, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The adapter branch alone, x Delta^T, (..., O), by plain autograd. Arguments as for `spp_linear`."""
    return F.linear(x, delta_weight(dense(weight), A, B, scale).to(x.dtype))


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias, (..., O), by plain autograd, which also gives the values of W their gradient."""
    W = unpack(weight)
    if weight.requires_grad:
        W = torch.zeros_like(W).masked_scatter(unpack_mask(weight), weight.values)
    return F.linear(x, W.to(x.dtype), None if bias is None else bias.to(x.dtype))


def dense(weight: Weight) -> Tensor:
    """W as a dense tensor (O, I); a packed W is unpacked."""
    return weight if isinstance(weight, Tensor) else unpack(weight)
