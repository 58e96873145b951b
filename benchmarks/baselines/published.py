"""The two forward passes of SPP's published code, written again from their description, to be measured against.

    y = x W^T + bias + s * x (A[g] * B * W)^T        g(i) = i // (O / R), so R must divide O

Both take what `spp.ops.spp_linear` takes, and give the same values and gradients. The cost is counted in GEMMs of
T tokens x O x I, forward and backward together, for a frozen W: the floor is 3.

Trained factors are fp32, as in the published runs. So a bf16 or fp16 weight needs autocast around the call, which is
how mixed-precision training runs them.

Shapes: T tokens, O output features, I input features, R row groups. x (..., I), W (O, I), A (R, I), B (O, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def variant1(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Write the whole adapter weight to memory, multiply by it, forget it, and do both again in backward.

    A is repeated to one row per output row, multiplied by B and by W: three temporaries of O x I. Activation
    checkpointing keeps them from living until backward, at the price of one more product.

    Six GEMMs: base forward, adapter forward, adapter forward again in backward, input gradient of the base, input
    gradient of the adapter, gradient of the adapter weight.

    Returns:
        (..., O) in the dtype of the base layer's product.

    Raises:
        ValueError: R does not divide O.
    """
    _group_size(weight, A)
    base = F.linear(x, weight, bias)
    adapter = checkpoint(_materialized, x, weight, A, B, use_reentrant=False)
    return (base + scale * adapter).to(base.dtype)


def _materialized(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    rows = A.repeat_interleave(_group_size(weight, A), dim=0)
    return F.linear(x, rows * B * weight)


def variant2(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Scale the input once per row group and multiply each copy by the group's rows of W: less memory, small products.

    Row i of the adapter's output is B[i] * sum_j W[i, j] * (A[g, j] * x[j]), so that nothing of the size of W is made;
    instead there are R scaled copies of x, and in backward R input gradients that are scaled and added.

    Four GEMMs: the base's two, and the adapter's two in R narrow pieces each. No gradient of the size of W is needed.

    Arguments, result and errors as for `variant1`.
    """
    base = F.linear(x, weight, bias)
    groups = weight.split(_group_size(weight, A))
    parts = [F.linear(x * row, rows) for row, rows in zip(A, groups, strict=True)]
    adapter = torch.cat(parts, dim=-1) * B.T
    return (base + scale * adapter).to(base.dtype)


def _group_size(weight: Tensor, A: Tensor) -> int:
    """Output rows per row group, O / R.

    Raises:
        ValueError: R does not divide O; the published code fails there, too.
    """
    if len(weight) % len(A):
        raise ValueError(f"the published grouping needs R to divide O; found R = {len(A)} and O = {len(weight)}")
    return len(weight) // len(A)
