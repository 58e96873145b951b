"""Add a new SPP adapter to the layers of a model that the options of a training run select."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from spp.adapters.options import AdapterSettings
from spp.adapters.tuner import SppConfig
from spp.errors import UsageError
from spp.models.architecture import bypassed_linears, linears_for_images, prunable_linears
from spp.options import is_one_of, listed_names

logger = logging.getLogger("spp")


def target_layers(model: PreTrainedModel, names: str, *, warn: bool = True) -> dict[str, nn.Module]:
    """Full module name -> linear layer, for `all-linear` or names separated by commas.

    Args:
        model: without adapter.
        names: see above.
        warn: log a warning if some of these layers get no adapter, because it would have no effect there.

    Raises:
        UsageError: the model has no layer of a name, or an adapter would have no effect on any of them.
    """
    bypassed = bypassed_linears(model) | linears_for_images(model)
    linears = {full: layer for full, layer in prunable_linears(model).items() if full not in bypassed}
    wanted = listed_names(names)
    if not wanted:
        raise UsageError("target-modules is empty; name modules, or pass all-linear")
    if names.strip().lower() != "all-linear":
        _check_names(wanted, linears, bypassed)
        linears = {full: layer for full, layer in linears.items() if is_one_of(full, wanted)}
        bypassed = {full: why for full, why in bypassed.items() if is_one_of(full, wanted)}
    if bypassed and warn:
        name, why = next(iter(bypassed.items()))
        logger.warning("%d linear layers get no adapter, e.g. %s: %s", len(bypassed), name, why)
    return linears


def _check_names(wanted: list[str], linears: Mapping[str, nn.Module], bypassed: Mapping[str, str]) -> None:
    """Refuse names without a layer that an adapter suits."""
    unknown = [name for name in wanted if not any(is_one_of(full, [name]) for full in linears)]
    for name in unknown:
        if why := next((why for full, why in bypassed.items() if is_one_of(full, [name])), None):
            raise UsageError(f"target-modules: an adapter would have no effect on {name}: {why}; leave it out")
    if unknown:
        known = ", ".join(sorted({full.rpartition(".")[2] for full in linears}))
        raise UsageError(f"target-modules: the model has no {', '.join(unknown)}; its linear layers are {known}")


def with_new_adapter(model: PreTrainedModel, targets: Mapping[str, nn.Module], options: AdapterSettings) -> PeftModel:
    """Add a new adapter to these layers, in place; returns the model."""
    settings = options.model_dump(include=set(AdapterSettings.model_fields) - {"target_modules"})
    config = SppConfig(**settings, target_modules=list(targets), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    model.config.use_cache = False  # the cache is for generation, and in the way of checkpointing
    return adapted
