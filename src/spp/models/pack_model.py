"""Pack the sparse layers of a model, in place, and unpack them again."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spp import ops
from spp.errors import UsageError
from spp.models.architecture import is_transposed, prunable_linears, sparsity, weight_oi
from spp.models.dense_saving import save_dense_, save_plainly_
from spp.models.packed_linear import PackedLinear
from spp.ops.packed import WORTH_PACKING

Model = TypeVar("Model", bound=nn.Module)


def pack_(model: PreTrainedModel, *, min_sparsity: float = WORTH_PACKING) -> PreTrainedModel:
    """Replace the sparse linear layers in the decoder blocks by `PackedLinear`, one by one, freeing each dense weight.

    Args:
        model: changed in place.
        min_sparsity: a layer with a smaller share of zeros stays as it is.

    Returns:
        The model itself.

    Raises:
        UsageError: no layer is sparse enough; or as `prunable_linears`.
    """
    linears = prunable_linears(model)
    found = 0
    for name in list(linears):
        module = linears.pop(name)  # the last reference, once the layer is replaced in the model
        if isinstance(module, PackedLinear):
            found += 1
        elif sparsity([module]) >= min_sparsity:
            model.set_submodule(name, packed_layer(module))
            found += 1
    if not found:
        raise UsageError(
            f"no linear layer of this {type(model).__name__} has {min_sparsity:.0%} zeros or more; packing would make "
            "it larger or save little. Prune it first (spp prune)"
        )
    save_dense_(model)
    return model


def packed_layer(module: nn.Module) -> PackedLinear:
    """A `PackedLinear` with the weight of an `nn.Linear` or `Conv1D`; the bias is the same parameter.

    Raises:
        ValueError: see `spp.ops.pack`.
    """
    bias = module._parameters.get("bias")
    layer = PackedLinear(ops.pack(weight_oi(module)), bias, transposed=is_transposed(module))
    return layer.train(module.training)


def unpack_(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Replace every `PackedLinear`, one by one, by an `nn.Linear` or `Conv1D` with the same bits (zeros are +0.0).

    Args:
        model: any module.
        dtype: dtype of the new layers, to which weights are rounded once; None keeps each layer's own.

    Returns:
        The model itself.

    Raises:
        SppError: a packed weight is damaged.
    """
    for name in [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]:
        module = model.get_submodule(name)
        assert isinstance(module, PackedLinear)
        model.set_submodule(name, _dense_layer(module).to(dtype=dtype))
    save_plainly_(model)
    return model


def _dense_layer(module: PackedLinear) -> nn.Module:
    weight = nn.Parameter(module.weight.contiguous(), requires_grad=False)
    if module.transposed:
        layer: nn.Module = Conv1D(0, 0)
        layer.nf, layer.nx = module.out_features, module.in_features
    else:
        layer = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", module._parameters["bias"])
    return layer.train(module.training)
