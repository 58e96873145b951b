"""Access to the weight W of an adapted layer, however the base layer stores it.

A base layer is an `nn.Linear`, a `Conv1D`, which stores W as (I, O), a `PackedLinear`, which stores the values that are
not zero, or a layer that bitsandbytes quantized. In addition, accelerate may offload W to the CPU or to disk, and FSDP
or ZeRO-3 may shard it. W goes to the operator without a cast or a copy, which autograd would save for backward: a
sharded W would then stay gathered.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from spp.models.architecture import is_transposed
from spp.models.packed_linear import PackedLinear
from spp.models.quantized import dequantized, is_quantized, made_again
from spp.ops import unpack
from spp.ops.packed import PackedWeight, Weight


@contextmanager
def weight_to_compute_with(layer: nn.Module, dtype: torch.dtype) -> Iterator[Weight]:
    """A context manager that yields W (O, I): the parameter, a view of it, the packed weight, or a dequantized copy.

    Args:
        layer: the base layer.
        dtype: of a dequantized copy, the input's; autograd does not save that copy, but makes it again in backward.
    """
    with onloaded(layer):
        if not is_quantized(layer):
            yield layer.packed if isinstance(layer, PackedLinear) else oriented(layer, stored(layer))
            return
        weight = dequantized(layer, dtype)
        with made_again(weight, lambda: dequantized(layer, dtype)):
            yield weight


def stored(layer: nn.Module) -> Tensor:
    """The tensor that the layer stores: its weight (a parameter; in FSDP's forward a tensor), or the packed values."""
    return layer.values if isinstance(layer, PackedLinear) else cast(Tensor, layer.weight)


def dense(layer: nn.Module, kept: Tensor | None = None) -> Tensor:
    """W as a dense tensor in the layer's own layout; a quantized W is dequantized to fp32.

    Args:
        layer: the base layer.
        kept: an earlier `stored(layer)`, on any device, to take W from; None takes the present one.
    """
    if is_quantized(layer):
        return dequantized(layer, torch.float32)
    now = stored(layer).detach()
    values = now if kept is None else kept.to(now.device)
    if not isinstance(layer, PackedLinear):
        return values
    return oriented(layer, unpack(PackedWeight(values, layer.bitmask, layer.row_offsets, layer.in_features)))


def set_dense(layer: nn.Module, weight: Tensor) -> None:
    """Set W to `weight`, a dense tensor in the layer's own layout; not for a quantized layer.

    Raises:
        SppError: the layer is packed, and `weight` is not zero everywhere that W is; nothing is changed.
    """
    if isinstance(layer, PackedLinear):
        layer.set_weight(weight)
    else:
        stored(layer).data.copy_(weight)


def oriented(layer: nn.Module, weight: Tensor) -> Tensor:
    """A view of `weight`: from the layer's own layout to (O, I), or back."""
    return weight.T if is_transposed(layer) else weight


@contextmanager
def onloaded(layer: nn.Module) -> Iterator[None]:
    """A context manager in which weights that accelerate offloads are loaded, as when the layer is called."""
    hook = getattr(layer, "_hf_hook", None)
    if hook is None or not getattr(hook, "offload", False):
        yield
        return
    hook.pre_forward(layer)
    try:
        yield
    finally:
        hook.post_forward(layer, torch.empty(0))
