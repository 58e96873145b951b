"""Add a new SPP adapter to the layers of a model that the options of a training run select."""

from __future__ import annotations

from collections.abc import Mapping

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from spp.adapters.options import AdapterSettings
from spp.adapters.tuner import SppConfig
from spp.errors import UsageError
from spp.models.architecture import prunable_linears


def target_layers(model: PreTrainedModel, names: str) -> dict[str, nn.Module]:
    """Full module name -> linear layer, for `all-linear` or names separated by commas."""
    linears = prunable_linears(model)
    if names.strip().lower() == "all-linear":
        return linears
    wanted = [name.strip() for name in names.split(",") if name.strip()]

    def has(full: str, name: str) -> bool:
        return full == name or full.endswith(f".{name}")

    if unknown := [name for name in wanted if not any(has(full, name) for full in linears)]:
        known = ", ".join(sorted({full.rpartition(".")[2] for full in linears}))
        raise UsageError(f"target-modules: the model has no {', '.join(unknown)}; its linear layers are {known}")
    if not wanted:
        raise UsageError("target-modules is empty; name modules, or pass all-linear")
    return {full: module for full, module in linears.items() if any(has(full, name) for name in wanted)}


def with_new_adapter(model: PreTrainedModel, targets: Mapping[str, nn.Module], options: AdapterSettings) -> PeftModel:
    """Add a new adapter to these layers, in place; returns the model."""
    settings = options.model_dump(include=set(AdapterSettings.model_fields) - {"target_modules"})
    config = SppConfig(**settings, target_modules=list(targets), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    model.config.use_cache = False  # the cache is for generation, and in the way of checkpointing
    return adapted
