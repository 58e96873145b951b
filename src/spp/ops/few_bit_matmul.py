"""The product with a weight of few-bit survivors: by integers for few tokens, by expanding W for more.

For at most `MOST_ROUNDED` tokens, as in decoding, reading the weight takes most of the time. There x is rounded to int8, once
for the whole product, with a scale per token and group of columns, as llama.cpp and others do it:

    x[t, j] ~ s[t, g] q[t, j], s[t, g] = max over the group of |x[t, j]| / 127, q an integer from -127 to 127, rounded to nearest
    y[t, i] = sum over g of scales[i, g] s[t, g] (sum over j in g of codebook[code[i, j]] q[t, j]) + bias[i]

The inner sums are exact. So y differs from x W^T by at most the sum over j of |W[i, j]| s[t, g] / 2, which is 1/254 of the
largest |x| of each group, beside the rounding of fp32; `rounding_bound` computes it. Rounding errors have either sign,
so in practice y is much nearer. A token with an entry that is not finite gives NaN in all of y. `exact=True` expands W instead,
whatever the number of tokens.

Shapes: T tokens, O output features, I input features, G groups of columns.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from spp.ops.autograd import exactly
from spp.ops.few_bits import FewBitWeight, require_layout
from spp.ops.native import few_bits as native
from spp.ops.scratch import scratch

Backend = Literal["auto", "reference", "native"]

MOST_ROUNDED = 4
"""Tokens for which x is rounded to int8."""

_BLOCK_BYTES = 2**21  # of W, expanded: rows that stay in the cache until they are multiplied


def few_bit_matmul(
    x: Tensor, weight: FewBitWeight, bias: Tensor | None = None, *, exact: bool = False, backend: Backend = "auto"
) -> Tensor:
    """y = x W^T + bias, (..., O) in x's dtype, for x (..., I) of any float dtype.

    Where x or the bias needs a gradient, W is expanded, and autograd sees a plain product with it.

    Args:
        x: (..., I); at most `MOST_ROUNDED` tokens are rounded to int8, see above.
        weight: (O, I), on x's device.
        bias: (O,) or None.
        exact: expand W rather than round x.
        backend: `reference` is the formula in plain torch; `native` our kernels. `auto` takes the kernels if they support
            the call, and else expands W.

    Raises:
        ValueError: the shapes do not fit, or the back-end does not support the call.
        SppError: the weight is damaged.
    """
    _require_fit(x, weight, bias)
    reason = native.why_not(weight, x.dtype)
    if backend == "native" and reason:
        raise ValueError(f"the back-end native cannot be used: {reason}")
    compiled = backend != "reference" and not reason
    tokens = x.reshape(-1, x.shape[-1])
    bias = None if bias is None else bias.to(x.dtype)
    learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if exact or learns or not 0 < len(tokens) <= MOST_ROUNDED or (backend == "auto" and reason):
        y = _expanded_product(tokens, weight, bias, compiled, learns)
    else:
        y = (native.matvec if compiled else rounded_product)(tokens.contiguous(), weight, bias)
    return y.reshape(*x.shape[:-1], len(weight))


def rounded_product(x: Tensor, weight: FewBitWeight, bias: Tensor | None) -> Tensor:
    """y = (s q) W^T + bias, (T, O) in x's dtype: the formula above, with sums in fp64."""
    q, s = round_tokens(x, weight.group)
    rounded = (q.double() * s.double().repeat_interleave(weight.group, dim=1))[:, : x.shape[1]]
    y = rounded @ weight.unpack(torch.float64).T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def round_tokens(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """q (T, G * group) int8, with zeros after the last column, and s (T, G) fp32, NaN where an entry is not finite."""
    columns = F.pad(x.float(), (0, -x.shape[1] % group)).view(len(x), -1, group)
    finite = columns.isfinite().all(dim=2)
    largest = columns.abs().amax(dim=2)
    s = torch.where(finite, largest / 127, torch.nan)
    usable = finite & (s > 0)
    q = torch.where(usable[..., None], columns / torch.where(usable, s, 1.0)[..., None], 0.0).round().to(torch.int8)
    return q.view(len(x), -1), s


def rounding_bound(x: Tensor, weight: FewBitWeight) -> Tensor:
    """The most by which rounding x changes x W^T, (T, O) fp64: the sum of |W[i, j]| s[t, g] / 2."""
    _, s = round_tokens(x, weight.group)
    halves = (s.double() / 2).repeat_interleave(weight.group, dim=1)[:, : x.shape[1]]
    return halves @ weight.unpack(torch.float64).abs().T


def _expanded_product(
    x: Tensor, weight: FewBitWeight, bias: Tensor | None, compiled: bool, learns: bool
) -> Tensor:
    """x W^T + bias with a dense W: whole where autograd keeps it, else in blocks of rows."""
    if not compiled or learns:
        with exactly(x):
            return F.linear(x, _dense(weight, x.dtype, compiled), bias)
    y = x.new_empty(len(x), len(weight))
    rows = max(1, _BLOCK_BYTES // (weight.in_features * x.dtype.itemsize))
    with exactly(x):
        for first in range(0, len(weight), rows):
            last = min(first + rows, len(weight))
            block = scratch("weight", (last - first, weight.in_features), x.dtype, x.device)
            native.expand(weight, block, first)
            y[:, first:last] = F.linear(x, block, None if bias is None else bias[first:last])
    return y


def _dense(weight: FewBitWeight, dtype: torch.dtype, compiled: bool) -> Tensor:
    if not compiled:
        return weight.unpack(dtype)
    out = torch.empty(weight.shape, dtype=dtype)
    native.expand(weight, out)
    return out


def _require_fit(x: Tensor, weight: FewBitWeight, bias: Tensor | None) -> None:
    """Check shapes, dtypes and devices.

    Raises:
        ValueError: names what does not fit.
    """
    require_layout(weight)
    if x.shape[-1:] != (weight.in_features,) or not x.dtype.is_floating_point:
        raise ValueError(
            f"expected x (..., {weight.in_features}) of floats for a weight {weight.shape}; "
            f"found {tuple(x.shape)} {x.dtype}"
        )
    if x.device != weight.device:
        raise ValueError(f"expected all tensors on one device; found x on {x.device}, weight on {weight.device}")
    if bias is not None and (tuple(bias.shape) != (len(weight),) or not bias.dtype.is_floating_point):
        raise ValueError(f"expected a bias ({len(weight)},) of floats; found {tuple(bias.shape)} {bias.dtype}")
