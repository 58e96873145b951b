"""Adapters on stacked experts: the formula for each expert, saved, loaded, merged in memory and on disk."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from families import tiny_model_of
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from spp import SppConfig
from spp.adapters.convert import convert
from spp.adapters.merge import merge
from spp.adapters.options import ConvertOptions, MergeOptions
from spp.adapters.spp_format import read_adapter
from spp.adapters.tuner.experts import SppExperts
from spp.checkpoints.options import VerifyOptions
from spp.checkpoints.verify import verify
from spp.errors import SppError, UsageError
from spp.models.experts import stacks_in
from spp.ops.reference import merged_weight

IDS = torch.arange(4, 68).view(2, 32)
# Stacked as they are; transposed, with biases; without gates; each expert by itself in the files.
FAMILIES = ["granitemoe", "gpt_oss", "nemotron_h", "mixtral"]


def pruned(family: str, **changes) -> PreTrainedModel:
    """A tiny model with half of each row of its experts' matrices zero."""
    model = tiny_model_of(family, **changes)
    for stack in stacks_in(model).values():
        stack.weight.data[..., ::2] = 0
    return model


def with_adapter(model: PreTrainedModel, **settings) -> PeftModel:
    """The model with an adapter on its experts alone, whose factors are random."""
    config = SppConfig(**{"task_type": "CAUSAL_LM", "r": 3, "directions": 2, "init_weights": False} | settings)
    if config.target_parameters is None:
        config.target_modules, config.target_parameters = [], list(stacks_in(model))
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    for index, factor in enumerate(parameter for parameter in adapted.parameters() if parameter.requires_grad):
        factor.data = torch.randn(factor.shape, generator=torch.Generator().manual_seed(index)) * 0.3
    return adapted.eval()


def merged_by_hand(model: PreTrainedModel, adapted: PeftModel) -> PreTrainedModel:
    """The formula, expert by expert, written into another model."""
    layers = {name: one for name, one in adapted.named_modules() if isinstance(one, SppExperts)}
    for name, stack in stacks_in(model).items():
        owner, _, parameter = name.rpartition(".")
        layer = layers[f"base_model.model.{owner}"]
        for expert, weight in enumerate(stack.weight):
            A, B = (getattr(layer, one)["default"][parameter].weight[expert].detach() for one in ("spp_A", "spp_B"))
            weight.data.copy_(merged_weight(weight.data, A, B, 2.0))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_computes_with_the_formula_for_its_own_factors(family):
    adapted = with_adapter(pruned(family))
    expected = logits(merged_by_hand(pruned(family), adapted))
    assert not torch.allclose(expected, logits(pruned(family)), atol=1e-4)
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-6)
    for experts in ("batched_mm", "eager"):
        adapted.get_base_model().set_experts_implementation(experts)
        torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-6)
        assert adapted.get_base_model().config._experts_implementation == experts


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_formula(family):
    """By autograd through weights that are merged with the formula, in the experts' own code."""
    adapted = with_adapter(pruned(family)).train()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: one.grad for name, one in adapted.named_parameters() if one.requires_grad}
    values = {name: one.detach().clone().requires_grad_() for name, one in adapted.named_parameters() if name in found}
    plain = pruned(family).train()
    plain.set_experts_implementation("eager")
    merged = {}
    for name, stack in stacks_in(plain).items():
        owner, _, parameter = name.rpartition(".")
        both = (values[f"base_model.model.{owner}.spp_{one}.default.{parameter}.weight"] for one in "AB")
        weights = [merged_weight(*one, 2.0) for one in zip(stack.weight.detach(), *both, strict=True)]
        whole = torch.stack(weights)
        merged[name] = whole.transpose(1, 2) if stack.transposed else whole
    torch.func.functional_call(plain, merged, (), {"input_ids": IDS, "labels": IDS}).loss.backward()
    for name, gradient in found.items():
        assert gradient is not None and gradient.any(), name
        torch.testing.assert_close(gradient, values[name].grad, rtol=1e-3, atol=1e-7)


def test_no_merged_weight_is_kept_for_backward():
    adapted = with_adapter(pruned("mixtral")).train()
    weights = {tuple(stack.shape) for stack in stacks_in(adapted).values()}
    weights |= {shape[1:] for shape in weights}
    own = {parameter.untyped_storage().data_ptr() for parameter in adapted.parameters()}
    kept = []
    few = IDS[:, :10]  # fewer than a weight has rows
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        adapted(input_ids=few, labels=few)
    large = [one for one in kept if tuple(one.shape) in weights and one.untyped_storage().data_ptr() not in own]
    assert kept and not large


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_is_loaded_and_merged_in_memory_and_on_disk(family, tmp_path):
    base, saved, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    pruned(family).save_pretrained(base)
    adapted = with_adapter(pruned(family))
    expected, stacks = logits(adapted), stacks_in(pruned(family))
    adapted.save_pretrained(saved)
    owner, _, parameter = min(stacks).rpartition(".")
    assert f"base_model.model.{owner}.spp_A.{parameter}.weight" in load_file(saved / "adapter_model.safetensors")
    assert set(read_adapter(saved).factors) == set(stacks)

    again = PeftModel.from_pretrained(pruned(family), str(saved)).eval()
    assert logits(again).equal(expected)
    again.merge_adapter()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-6)
    again.unmerge_adapter()
    assert all(one.weight.equal(stacks[name].weight) for name, one in stacks_in(again.unload()).items())

    report = merge(MergeOptions.build({"model": str(base), "adapter": saved, "out": out}))
    assert report.zeros and report.tensors
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    by_hand = stacks_in(merged_by_hand(pruned(family), adapted))
    assert all(stack.weight.equal(by_hand[name].weight) for name, stack in stacks_in(merged).items())
    assert verify(VerifyOptions.build({"base": str(base), "other": str(out)})).verified


def test_row_groups_of_an_odd_number_fit_gates_and_ups_that_the_files_hold_apart(tmp_path):
    """An odd number of groups has one that lies in both."""
    base, saved, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    pruned("qwen2_moe").save_pretrained(base)
    for r in (1, 5, 7):
        adapted = with_adapter(pruned("qwen2_moe"), r=r)
        adapted.save_pretrained(saved)
        merge(MergeOptions.build({"model": str(base), "adapter": saved, "out": out, "overwrite": True}))
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        by_hand = stacks_in(merged_by_hand(pruned("qwen2_moe"), adapted))
        assert all(stack.weight.equal(by_hand[name].weight) for name, stack in stacks_in(merged).items())


def test_pruned_experts_are_adapted_with_all_linear_layers_and_dense_ones_are_named(caplog):
    model = tiny_model_of("mixtral")
    stacks = stacks_in(model)
    dense = "model.layers.1.mlp.experts.down_proj"
    for name, stack in stacks.items():
        stack.weight.data[..., ::2] = 1 if name == dense else 0
    with caplog.at_level(logging.WARNING, "spp"):
        adapted = get_peft_model(model, SppConfig(task_type="CAUSAL_LM"))
    assert set(adapted.peft_config["default"].target_parameters) == stacks.keys() - {dense}
    assert f"1 weights of experts get no adapter, e.g. {dense}: it is dense" in caplog.text
    assert "IS DENSE" not in caplog.text  # most of it is not
    excluded = SppConfig(task_type="CAUSAL_LM", exclude_modules=["experts"], layers_to_transform=[0])
    assert not get_peft_model(pruned("mixtral"), excluded).peft_config["default"].target_parameters


def test_from_python_a_dense_base_and_experts_of_an_unknown_kind_are_warned_of(caplog, tiny_model):
    with caplog.at_level(logging.WARNING, "spp"):
        get_peft_model(tiny_model("llama"), SppConfig(task_type="CAUSAL_LM"))
    assert "LlamaForCausalLM IS DENSE: 0.00 % of its weights are zero" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "spp"):
        get_peft_model(tiny_model_of("llama4_text"), SppConfig(task_type="CAUSAL_LM"))
    assert (
        "weights of experts get no adapter, e.g. model.layers.0.feed_forward.experts.gate_up_proj: SPP does not know"
        in caplog.text
    )


def test_from_python_layers_on_which_an_adapter_has_no_effect_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "spp"):
        get_peft_model(tiny_model_of("bamba"), SppConfig(task_type="CAUSAL_LM"))
    assert (
        "1 linear layers get no adapter, e.g. model.layers.0.mamba.out_proj: the model reads its weight" in caplog.text
    )


def test_a_compiled_model_computes_the_same():
    adapted = with_adapter(pruned("mixtral"))
    expected = logits(adapted)
    torch.testing.assert_close(logits(torch.compile(adapted, backend="eager")), expected, rtol=1e-4, atol=1e-6)


def test_two_adapters_and_dropout_add_up():
    model = with_adapter(pruned("mixtral"))
    first = logits(model)
    model.add_adapter("other", SppConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"], dropout=0.1))
    assert logits(model).equal(first)  # not active yet
    model.base_model.set_adapter(["default", "other"])
    model.eval()
    torch.testing.assert_close(logits(model), first, rtol=1e-4, atol=1e-6)  # its Delta is still 0
    model.set_adapter("other")
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(pruned("mixtral")), rtol=1e-4, atol=1e-6)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    grown = [name for name, one in model.named_parameters() if one.grad is not None]
    assert grown and all("spp_A.other.down_proj" in name or "spp_B.other.down_proj" in name for name in grown)


def test_weights_that_are_used_in_an_unknown_way_are_one_error():
    model = with_adapter(pruned("gpt_oss"))
    experts = next(one for one in model.modules() if isinstance(one, SppExperts)).base_layer
    experts.is_transposed = False
    with pytest.raises(SppError, match=r"in a way that SPP does not know \(.*\); leave their stacks out"):
        logits(model)
    with pytest.raises(ValueError, match="target_parameters: q_proj is no stack of experts"):
        get_peft_model(pruned("mixtral"), SppConfig(target_modules=[], target_parameters=["q_proj"]))


def test_hira_has_no_place_for_experts(tmp_path: Path):
    with_adapter(pruned("mixtral")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match="factors of stacked experts, e.g. model.layers.0.mlp.experts.down_proj"):
        convert(ConvertOptions.build({"adapter": tmp_path / "adapter", "out": tmp_path / "hira"}))
