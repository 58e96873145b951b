"""The cases of SPP for PEFT's parametrized tests.

Where a test is parametrized by PEFT's methods, its cases are replaced by the ones here: HiRA's, the method closest to
SPP, translated; and some more for what only SPP has. `FROM_LORA` names the tests that list a few methods without HiRA
and yet hold for SPP: there, LoRA's cases are translated.
"""

from __future__ import annotations

import dataclasses
import functools
from types import FunctionType
from typing import Any

from peft import HiraConfig, LoraConfig, PeftConfig

from spp import SppConfig

FROM_LORA = {
    "test_adapter_name_makes_no_difference",
    "test_inject_from_state_dict_and_from_config_target_same_layers",
    "test_base_model_module_named_like_peft_prefix",
    "test_combined_with_peft_method_usage",
    "test_combined_with_peft_raises_target_layer_not_found",
    "test_disable_adapters_with_merging",
    "test_load_multiple_adapters",
    "test_modules_to_save_excludes_trainable_tokens",
    "test_multiple_adapters_different_token_indices",
    "test_multiple_adapters_disjunct_token_indices_merging_sequentially",
    "test_multiple_adapters_mixed_modules_to_save",
    "test_multiple_adapters_mixed_modules_to_save_order_switched",
    "test_multiple_adapters_overlapping_token_indices_merging",
    "test_multiple_adapters_overlapping_token_indices_merging_sequentially",
    "test_no_embeddings_in_save_with_combined_usage",
    "test_safe_merge_with_adapter",
    "test_save_pretrained_auto",
    "test_save_pretrained_with_target_modules",
    "test_self_targeting_is_ignored",
    "test_weight_tying_applied_when_model_is_tied",
    "test_weight_tying_applied_when_model_is_tied_encoder_decoder",
    "test_weight_tying_noop_when_model_is_untied",
    "test_add_adapter_no_autocast_adapter_dtype",
}
_COMPILED = [
    (SppConfig(task_type="CAUSAL_LM"), {}),
    (SppConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]), {}),
    (SppConfig(task_type="CAUSAL_LM", dropout=0.05), {}),
    (SppConfig(task_type="CAUSAL_LM", modules_to_save=["embed_tokens"]), {}),
]
# Tests with settings of their own for each method -> SPP's.
OWN = {
    "test_causal_lm_training_trainer_compile": _COMPILED,
    "test_causal_lm_training_pytorch_compile": _COMPILED,
}
# Tests of all methods that are not parametrized by them.
OF_ALL_METHODS = {"test_from_peft_type"}

MORE_SINGLE = [
    ("Vanilla MLP 7 SPP", "MLP", SppConfig, {"target_modules": ["lin0"], "r": 3}),  # does not divide the 20 rows
    (
        "Vanilla MLP 8 SPP",
        "MLP",
        SppConfig,
        {"target_modules": ["lin0", "lin1"], "r": 4, "rank_pattern": {"lin1": 1}, "scale": 0.5},
    ),
    ("Vanilla MLP 9 SPP", "MLP", SppConfig, {"exclude_modules": ["lin1"]}),  # of all linear layers
    (
        "Embedding + transformers Conv1D 4 SPP",
        "EmbConv1D",
        SppConfig,
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
    ),
]
MORE_MULTIPLE = [
    (
        "SPP Different settings",
        "spp",
        SppConfig,
        {"target_modules": ["lin0"], "r": 4, "init_weights": False},
        {"target_modules": ["lin0"], "r": 3, "scale": 0.5, "init_weights": False},
    ),
]


def spp_cases(values: list[Any]) -> list[Any]:
    """SPP's cases in place of these, which HiRA's are among."""
    cases = [translate(value) for value in values if mentions(value, HiraConfig)]
    first = cases[0]
    if isinstance(first, tuple) and len(first) == 4:
        cases += MORE_SINGLE
    elif isinstance(first, tuple) and len(first) == 5:
        cases += MORE_MULTIPLE
    elif isinstance(first, tuple) and (task_type := first[1].get("task_type")):
        more = {} if task_type == "SEQ_CLS" else {"trainable_token_indices": [0, 1, 3]}
        cases.append((SppConfig, {"task_type": task_type, "r": 5, "dropout": 0.05, **more}))
        if (
            task_type == "FEATURE_EXTRACTION"
        ):  # the tests want gradients everywhere, but their loss leaves out the pooler
            cases = [(SppConfig, {**settings, "exclude_modules": ["pooler.dense"]}) for _, settings in cases]
    return cases


def translate(value: Any) -> Any:
    """A value of a parametrization with SPP in place of HiRA and LoRA."""
    if value in (HiraConfig, LoraConfig):
        return SppConfig
    if isinstance(value, LoraConfig):
        return SppConfig(
            init_weights=bool(value.init_lora_weights),
            **{name: item for name, item in vars(value).items() if name in _shared_fields()},
        )
    if isinstance(value, FunctionType):  # that makes a configuration
        return functools.wraps(value)(lambda *arguments: translate(value(*arguments)))
    if isinstance(value, str):
        return value.replace("HiRA", "SPP").replace("hira", "spp")
    if isinstance(value, dict):
        return {"dropout" if name == "hira_dropout" else name: item for name, item in value.items()}
    return tuple(map(translate, value)) if isinstance(value, tuple) else value


@functools.cache
def _shared_fields() -> set[str]:
    """What SPP's and LoRA's configurations have in common, by name and meaning."""
    names = ({field.name for field in dataclasses.fields(config)} for config in (SppConfig, LoraConfig))
    return set.intersection(*names) - {"peft_type", "auto_mapping", "peft_version"}


def mentions(value: Any, *methods: type[PeftConfig]) -> bool:
    """Whether a value of a parametrization has one of these methods' configurations, or any method's, in it."""
    if isinstance(value, tuple):  # `pytest.param` makes one as well
        return any(mentions(item, *methods) for item in value)
    if isinstance(value, PeftConfig):
        return not methods or type(value) in methods
    if isinstance(value, FunctionType):
        names = value.__code__.co_names
        return any(method.__name__ in names for method in methods or (HiraConfig, LoraConfig))
    return isinstance(value, type) and issubclass(value, PeftConfig) and (not methods or value in methods)


def unsupported(case: Any) -> bool:
    """Whether a case puts an adapter on an embedding or a convolution."""
    if not isinstance(case, tuple) or not isinstance(case[-1], dict):
        return False
    targets = case[-1].get("target_modules") or []
    names = {targets} if isinstance(targets, str) else set(targets)
    # The model Conv1d has torch's convolution of that name; EmbConv1D has transformers' linear layer.
    return "Conv1d" in case or not names.isdisjoint({"emb", "conv2d", "conv3d", "l2.*"})
