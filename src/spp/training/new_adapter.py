"""Add a new SPP adapter to the layers of a model that the options of a training run select."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from spp.adapters.options import AdapterSettings
from spp.adapters.tuner import SppConfig
from spp.adapters.tuner.suitability import warn_of_bypassed
from spp.errors import UsageError
from spp.models.architecture import bypassed_linears, decoder_blocks, linears_for_images, prunable_linears
from spp.models.experts import Stack, pruned_stacks, stacks_in
from spp.options import is_one_of, listed_names


def target_layers(model: PreTrainedModel, names: str, *, warn: bool = True) -> dict[str, nn.Module]:
    """Full module name -> linear layer, for `all-linear` or names separated by commas.

    Args:
        model: without adapter.
        names: see above.
        warn: log a warning if some of these layers get no adapter, because it would have no effect there.

    Raises:
        UsageError: the model has neither a layer nor a stack of experts of a name, or an adapter would have no effect
            on any of them.
    """
    bypassed = bypassed_linears(model) | linears_for_images(model)
    linears = {full: layer for full, layer in prunable_linears(model).items() if full not in bypassed}
    wanted = listed_names(names)
    if not wanted:
        raise UsageError("target-modules is empty; name modules, or pass all-linear")
    if not _means_all(names):
        _check_names(wanted, linears, bypassed, stacks_in(model))
        linears = {full: layer for full, layer in linears.items() if is_one_of(full, wanted)}
        bypassed = {full: why for full, why in bypassed.items() if is_one_of(full, wanted)}
    if warn:
        warn_of_bypassed(bypassed)
    return linears


def target_stacks(model: PreTrainedModel, names: str) -> dict[str, Stack]:
    """Full name -> stack of experts to adapt: for `all-linear` those that are pruned, else those that are named.

    Args:
        model: without adapter; on the meta device, where zeros cannot be counted, those that `spp prune` reaches.
        names: as for `target_layers`.
    """
    inside = f"{decoder_blocks(model)[0]}."
    stacks = pruned_stacks(model) if _means_all(names) else stacks_in(model)
    wanted = listed_names(names)
    return {
        full: stack
        for full, stack in stacks.items()
        if full.startswith(inside) and (_means_all(names) or is_one_of(full, wanted))
    }


def _means_all(names: str) -> bool:
    return names.strip().lower() == "all-linear"


def _check_names(
    wanted: list[str], linears: Mapping[str, nn.Module], bypassed: Mapping[str, str], stacks: Mapping[str, Stack]
) -> None:
    """Refuse names without a layer or a stack of experts that an adapter suits."""
    unknown = [name for name in wanted if not any(is_one_of(full, [name]) for full in [*linears, *stacks])]
    for name in unknown:
        if why := next((why for full, why in bypassed.items() if is_one_of(full, [name])), None):
            raise UsageError(f"target-modules: an adapter would have no effect on {name}: {why}; leave it out")
    if unknown:
        known = ", ".join(sorted({full.rpartition(".")[2] for full in [*linears, *stacks]}))
        raise UsageError(f"target-modules: the model has no {', '.join(unknown)}; its linear layers are {known}")


def with_new_adapter(
    model: PreTrainedModel,
    targets: Mapping[str, nn.Module],
    options: AdapterSettings,
    *,
    stacks: Iterable[str] = (),
) -> PeftModel:
    """Add a new adapter to these layers and stacks of experts, in place; returns the model."""
    settings = options.model_dump(include=set(AdapterSettings.model_fields) - {"target_modules"})
    config = SppConfig(
        **settings, target_modules=list(targets), target_parameters=list(stacks) or None, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    model.config.use_cache = False  # the cache is for generation, and in the way of checkpointing
    return adapted
