"""Quantize sparse layers to 4 or 8 bits with bitsandbytes while an adapter is trained; every zero stays exact.

A quantized weight is dequantized for each use, in forward and again in backward; the dequantized copy is not kept.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spp.errors import SppError, UsageError
from spp.ops.zero_proof import lost_zeros

Quantization = Literal["nf4", "int8"]


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight was quantized by bitsandbytes."""
    return type(layer._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params")


def dequantized(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) of a quantized layer, dequantized to `dtype`."""
    from peft.utils.integrations import (
        dequantize_bnb_weight,  # late: peft imports us
    )

    return dequantize_bnb_weight(layer.get_parameter("weight"), state=getattr(layer, "state", None)).to(dtype)


@contextmanager
def made_again(weight: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """Context manager: autograd does not save `weight` for backward, but calls `again` there to recompute it."""
    place, shape = weight.data_ptr(), weight.shape  # not `weight` itself: autograd keeps both functions

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        return again if saved.data_ptr() == place and saved.shape == shape else saved

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def require_bitsandbytes(asked: str) -> None:
    """Raise a UsageError if bitsandbytes, which what is asked for needs, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f'{asked} needs bitsandbytes: pip install "spp-llm[quant]"')


def quantize_(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], kind: Quantization, device: torch.device
) -> dict[str, nn.Module]:
    """Replace dense layers by quantized ones, one by one, and check that every zero is still an exact zero.

    Args:
        model: changed in place.
        layers: name of each `nn.Linear` in it -> itself.
        kind: nf4 (4 bits, double quantization) or int8.
        device: the device that they will be used on.

    Returns:
        Name -> the new layer.

    Raises:
        UsageError: a layer is not an `nn.Linear`.
        SppError: a zero of a weight would become something else.
    """
    if odd := [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]:
        raise UsageError(
            f"quantize takes layers of the kind nn.Linear, and {odd[0]} is a {type(layers[odd[0]]).__name__}; leave out"
            " --quantize"
        )
    found: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        assert isinstance(layer, nn.Linear)
        weight = layer.weight.detach()
        quantized = _quantized(layer, kind).to(device)
        if lost := lost_zeros(weight, dequantized(quantized, weight.dtype).to(weight.device)):
            raise SppError(
                f"{name}: {lost} zeros would not be zeros after quantization with {kind}, which SPP would take for "
                "weights; leave out --quantize, and report it to bitsandbytes"
            )
        model.set_submodule(name, quantized)
        found[name] = quantized
    return found


def _quantized(layer: nn.Linear, kind: Quantization) -> nn.Module:
    """A layer that bitsandbytes quantizes when it is moved to a device."""
    from bitsandbytes import nn as bnb  # pyright: ignore[reportMissingImports]  # an extra

    shape = (layer.in_features, layer.out_features)
    bias = layer.bias is not None
    if kind == "nf4":
        made = bnb.Linear4bit(*shape, bias=bias, compute_dtype=layer.weight.dtype, quant_type="nf4")
        made.weight = bnb.Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4")
    else:
        made = bnb.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
        made.weight = bnb.Int8Params(layer.weight.detach(), requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made
