"""Train the survivors themselves: make the values of packed layers trainable."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn

from spp.errors import UsageError
from spp.models.packed_linear import PackedLinear


def trainable_values(model: nn.Module, layers: Container[str] | None = None) -> list[nn.Parameter]:
    """Make the values of a model's packed layers trainable, and freeze everything else, in place.

    The values become fp32 (fp64 ones stay): the master values, which an optimizer changes by steps that are too small
    for 16 bits. The layers still compute in the dtype of their input. Which entries are stored never changes, and so
    zeros stay zeros; a value that is trained to zero is still trained. `unpack_(model, dtype)` rounds the result.

    Args:
        model: with packed layers (see `pack_`).
        layers: full names of the layers to train; None means every packed layer.

    Returns:
        The values, one parameter (number of non-zeros,) a layer: what an optimizer takes.

    Raises:
        UsageError: none of these layers is packed.
    """
    model.requires_grad_(False)
    values = []
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and (layers is None or name in layers):
            wide = torch.promote_types(module.values.dtype, torch.float32)
            module.values = nn.Parameter(module.values.detach().to(wide))
            values.append(module.values)
    if not values:
        raise UsageError(f"no layer of this {type(model).__name__} is packed; call spp.pack_ on it first")
    return values
