"""Warnings of a model for which SPP does little: without zeros, or with weights that get no adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spp.adapters.tuner.experts import SppExperts
from spp.adapters.tuner.layer import Factor, SppLinear
from spp.models.experts import stacks_in
from spp.models.packed_linear import PackedLinear
from spp.models.quantized import is_quantized
from spp.ops.zeros import SPARSE_FROM, share_of_zeros

logger = logging.getLogger("spp")


def warn_of_unsuitable(model: nn.Module) -> None:
    """Warn if the adapted weights have no zeros to keep, or if experts get no adapter.

    Args:
        model: with adapters. Where weights are packed or quantized, zeros are not counted, and on the meta device there
            is nothing to warn of.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    weights = list(_adapted(model))
    counted = [weight for weight in weights if weight is not None]
    if weights and len(counted) == len(weights):
        warn_if_dense(
            getattr(model, "name_or_path", "") or type(model).__name__, share_of_zeros(counted, up_to=SPARSE_FROM)
        )
    if left := _left_out(model):
        known = stacks_in(model)
        why = "it is dense, and has no zeros to keep" if left[0] in known else "SPP does not know how it is used"
        logger.warning("%d weights of experts get no adapter, e.g. %s: %s", len(left), left[0], why)


def warn_of_bypassed(layers: Mapping[str, str]) -> None:
    """Warn of linear layers, by full name, that get no adapter because it would have no effect; why is their value."""
    if layers:
        name, why = next(iter(layers.items()))
        logger.warning("%d linear layers get no adapter, e.g. %s: %s", len(layers), name, why)


def warn_if_dense(name: str, zeros: float) -> None:
    """Warn if a model, of which this share of the weights is zero, was not pruned."""
    if zeros < SPARSE_FROM:
        logger.warning(
            "%s IS DENSE: %.2f %% of its weights are zero. SPP keeps zeros, and there are none to keep; "
            "prune it first (spp prune), or use LoRA",
            name,
            100 * zeros,
        )


def _adapted(model: nn.Module) -> Iterator[Tensor | None]:
    """The weights that have adapters; None for those whose zeros cannot be counted, or need not be."""
    for module in model.modules():
        if isinstance(module, SppLinear):
            base = module.get_base_layer()
            yield (
                None if isinstance(base, PackedLinear) or is_quantized(base) else base.get_parameter("weight").detach()
            )
        elif isinstance(module, SppExperts):
            for name, stack in module.stacks.items():
                if module.adapts(name):
                    yield from stack.weight.detach()


def _left_out(model: nn.Module) -> list[str]:
    """Full names of stacked matrices, (E, O, I), without an adapter."""
    adapted = {
        f"{name}.base_layer.{stack}"
        for name, module in model.named_modules()
        if isinstance(module, SppExperts)
        for stack in module.stacks
        if module.adapts(stack)
    }
    names = (
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if not isinstance(module, Factor | _ConvNd)
        for parameter, value in module.named_parameters(recurse=False)
        if value.ndim == 3 and len(value) > 1
    )
    return [name.replace(".base_layer.", ".") for name in names if name not in adapted]
