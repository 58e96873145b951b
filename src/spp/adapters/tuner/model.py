"""Put SPP adapters on a model's linear layers: what PEFT calls a tuner."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from accelerate import init_empty_weights
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from spp.adapters.tuner.config import SppConfig
from spp.adapters.tuner.experts import SppExperts
from spp.adapters.tuner.layer import SppLayer, SppLinear
from spp.adapters.tuner.ranks import rank_of, set_ranks
from spp.adapters.tuner.suitability import warn_of_bypassed, warn_of_unsuitable
from spp.models.architecture import shape_oi
from spp.models.bypassed import bypassed
from spp.models.experts import pruned_stacks, stacks_in
from spp.models.packed_linear import PackedLinear
from spp.models.quantized import is_quantized
from spp.ops.dtypes import dtype_name
from spp.options import is_one_of

_HEADS = (*SEQ_CLS_HEAD_NAMES, "qa_outputs")
# Parts that wrappers insert into module names, but not into the keys of a state dict.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class SppModel(BaseTuner):
    """A model with SPP adapters; made by `peft.get_peft_model(model, SppConfig(...))`.

    Args:
        model: the (pruned) model; it is changed in place.
        config: an `SppConfig`, or a dict with one for each adapter name.
        adapter_name: name of the first adapter.
    """

    prefix: str = "spp_"
    tuner_layer_cls = SppLayer  # pyright: ignore[reportAssignmentType]
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter on the layers that its config selects, and record their row groups in the config."""
        reasons = bypassed(model)
        self._bypassed = {name: reasons[module] for name, module in model.named_modules() if module in reasons}
        with warnings.catch_warnings():
            # PEFT looks for the keys of rank_pattern among modules only, and SPP's are also names of stacks.
            if self.peft_config[adapter_name].target_parameters:  # pyright: ignore[reportAttributeAccessIssue]
                warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        assert isinstance(config, SppConfig)
        if config.r is None and (ranks := _ranks(config, model, adapter_name)):
            set_ranks(config, ranks)
        if not config.inference_mode:
            warn_of_unsuitable(model)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        assert isinstance(peft_config, SppConfig)
        if peft_config.target_modules is None:
            peft_config.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
        targets = peft_config.target_modules
        if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            peft_config.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
            if peft_config.target_parameters is None:
                peft_config.target_parameters = self._pruned_stacks(peft_config) or None
            self._exclude_heads(peft_config)
            self._exclude_bypassed(peft_config)
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Include packed layers in all-linear; PEFT itself only finds dense ones."""
        assert isinstance(peft_config, SppConfig)
        packed = {
            name
            for name, module in model.named_modules()
            if isinstance(module, PackedLinear) and not name.endswith(".base_layer")  # it has an adapter already
        }
        if packed and peft_config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            _maybe_include_all_linear_layers(peft_config, model)
            assert isinstance(peft_config.target_modules, set)
            peft_config.target_modules |= packed

    def _pruned_stacks(self, config: SppConfig) -> list[str]:
        """Full names of the pruned stacks of experts that exclude_modules and layers_to_transform leave in."""

        def selected(key: str) -> bool:
            by_last_part = copy.copy(config)
            by_last_part.target_modules = {key.rpartition(".")[2]}
            return bool(check_target_module_exists(by_last_part, key))

        return [name for name in pruned_stacks(self.model) if selected(name) and selected(name.rpartition(".")[0])]

    def _exclude_heads(self, config: SppConfig) -> None:
        """Exclude a classification head, which is new and dense, from all-linear; PEFT does so for some tasks only."""
        heads = {name for name in _HEADS if isinstance(getattr(self.model, name, None), nn.Linear)}
        if heads and config.exclude_modules is None:
            config.exclude_modules = heads

    def _exclude_bypassed(self, config: SppConfig) -> None:
        """Exclude layers on which an adapter would have no effect from all-linear."""
        linears = {name for name in self._bypassed if isinstance(self.model.get_submodule(name), nn.Linear)}
        if linears and not isinstance(config.exclude_modules, str):
            if not config.inference_mode:
                warn_of_bypassed({name: self._bypassed[name] for name in sorted(linears)})
            config.exclude_modules = {*(config.exclude_modules or ()), *linears}

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        """Whether to adapt the module `key`: PEFT's rule, but layers_to_transform also applies to all-linear.

        PEFT replaces all-linear by full module names, and adapts those whatever layer they are in.
        """
        assert isinstance(peft_config, SppConfig)
        found = check_target_module_exists(peft_config, key)
        if not found or peft_config.layers_to_transform is None or key not in (peft_config.target_modules or ()):
            return found
        by_last_part = copy.copy(peft_config)
        by_last_part.target_modules = {key.rpartition(".")[2]}
        return check_target_module_exists(by_last_part, key)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, SppConfig)
        if isinstance(target, SppLinear):
            target.update_layer(adapter_name, _rank(peft_config, current_key, target), peft_config)
            return
        _require_adaptable(target, current_key)
        if current_key in self._bypassed and not peft_config.inference_mode:
            why = self._bypassed[current_key]
            raise ValueError(f"{current_key}: an adapter would have no effect: {why}; leave it out of target_modules")
        layer = SppLinear(target, adapter_name, _rank(peft_config, current_key, target), peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable until it is set active
        self._replace_module(parent, target_name, layer, target)

    def _inject_parameters(
        self, peft_config: PeftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Put the adapter on the stacks of experts in `target_parameters`; returns their full names.

        PEFT's method has one wrapper around the other for each parameter, which SPP has not.
        """
        assert isinstance(peft_config, SppConfig)
        wanted = peft_config.target_parameters or []
        stacks = {name: stack for name, stack in stacks_in(model).items() if is_one_of(name, wanted)}
        for target in wanted:
            if not any(is_one_of(name, [target]) for name in stacks):
                raise ValueError(f"target_parameters: {target} is no stack of experts that SPP knows how to adapt")
        ranks: dict[str, dict[str, int]] = {}
        for name, stack in stacks.items():
            rank = rank_of(peft_config, name, *stack.shape[1:])
            ranks.setdefault(name.removesuffix(f".{stack.parameter}"), {})[stack.parameter] = rank
        for name, own in ranks.items():
            target = model.get_submodule(name)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                if isinstance(target, SppExperts):
                    target.update_layer(adapter_name, own, peft_config)
                    continue
                layer = SppExperts(target, adapter_name, own, peft_config)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            model.set_submodule(name, layer)
        return list(stacks)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put `new_module` in the place of `child`.

        PEFT's method would also assign the weight of `child`. `new_module` has that already, and for an embedding with
        trained rows (trainable_token_indices) it is not a parameter.
        """
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "SPP does not mix adapters within a batch (adapter_names); call set_adapter, one batch per adapter"
            )
        yield

    # The two overrides match keys by name. PEFT's own look the modules up, and silently find none where a wrapper
    # (FSDP, activation checkpointing) has inserted a part into their names that the state dict's keys lack.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        keys = _factor_keys(model, adapter_name)
        # PEFT takes the adapter's name out of a key where it is the part before the last.
        return {
            f"{keys[key].removesuffix('.weight')}.{adapter_name}.weight": value
            for key, value in state_dict.items()
            if key in keys
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        in_model: dict[str, str] = {}
        for key, saved in _factor_keys(model, adapter_name).items():
            # A model that transformers put the adapter on (add_adapter) lacks the prefix that PEFT saves with.
            in_model[saved] = in_model[f"base_model.model.{saved}"] = key
        return {in_model.get(key, key): value for key, value in state_dict.items()}


def _rank(config: SppConfig, name: str, layer: nn.Module) -> int:
    """R of a layer, which may have an adapter already."""
    base = layer.get_base_layer() if isinstance(layer, SppLinear) else layer
    return rank_of(config, name, *shape_oi(base))


def _ranks(config: SppConfig, model: nn.Module, adapter_name: str) -> dict[str, int]:
    """Full name of each weight that has this adapter -> the R that the config has for it."""
    ranks = {}
    for name, module in model.named_modules():
        if isinstance(module, SppLinear) and adapter_name in module.r:
            ranks[name] = _rank(config, name, module)
        elif isinstance(module, SppExperts):
            for stack in module.r.get(adapter_name, ()):
                full = f"{name}.{stack}"
                ranks[full] = rank_of(config, full, *module.stacks[stack].shape[1:])
    return ranks


def _factor_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Key of each of an adapter's factors in the model's state dict -> its key in the adapter's file."""
    keys = {}
    for name, module in model.named_modules():
        if isinstance(module, SppLayer):
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            start = f"{name}." if name else ""
            for factor in SppLayer.adapter_layer_names:
                held = getattr(module, factor)
                if adapter_name in held:
                    for key, _ in held[adapter_name].named_parameters():
                        keys[f"{start}{factor}.{adapter_name}.{key}"] = f"{start}{factor}.{key}"
    return keys


def _require_adaptable(target: nn.Module, name: str) -> None:
    """Raise a ValueError for a module on which SPP would have no effect, or a wrong one."""
    if isinstance(target, BaseTunerLayer):
        raise ValueError(
            f"{name}: has an adapter of another method ({type(target).__name__}); SPP does not stack on it"
        )
    if isinstance(target, NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"{name}: nn.MultiheadAttention reads this weight without calling the layer, so that an adapter on it "
            "would do nothing; leave it out of target_modules"
        )
    if isinstance(target, PackedLinear):
        return
    if not isinstance(target, nn.Linear | Conv1D):
        raise ValueError(
            f"Target module {name} is a {type(target).__name__}, which is not supported: SPP adapts torch.nn.Linear, "
            "transformers' Conv1D and spp's PackedLinear"
        )
    weight = target.get_parameter("weight")
    if not weight.is_floating_point() and not is_quantized(target):
        dtype = dtype_name(weight.dtype)
        raise ValueError(
            f"{name}: the weight is quantized ({dtype}), in a way that SPP does not know; load it in bfloat16"
        )
    if getattr(target, "_hf_tp_plan", None) is not None:
        raise ValueError(f"{name}: the weight is split by tensor parallelism, which SPP does not support")
