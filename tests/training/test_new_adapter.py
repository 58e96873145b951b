"""Where adapters go, and how large they are."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from families import tiny_model_of, whole_model_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

import spp
from spp.adapters.options import AdapterSettings
from spp.adapters.tuner.layer import SppLinear
from spp.errors import UsageError
from spp.models.architecture import prunable_linears
from spp.training.new_adapter import target_layers, with_new_adapter


def trained(model: nn.Module) -> dict[str, int]:
    """Trained parameters of every layer that has an adapter."""
    return {
        name.removeprefix("base_model.model."): sum(p.numel() for p in module.parameters() if p.requires_grad)
        for name, module in model.named_modules()
        if hasattr(module, "base_layer")
    }


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_each_layer_has_the_budget_of_lora(tiny_model, family, pack):
    model = tiny_model(family)
    config = LoraConfig(r=4, target_modules=list(prunable_linears(model)), fan_in_fan_out=family == "gpt2")
    lora = trained(get_peft_model(tiny_model(family), config))
    if pack:
        for layer in prunable_linears(model).values():
            layer.weight.data[:, ::2] = 0
        spp.pack_(model)
    ours = trained(
        with_new_adapter(
            model, target_layers(model, "all-linear"), AdapterSettings.build({"lora_rank": 4, "directions": 2})
        )
    )
    assert ours.keys() == lora.keys()
    for name, count in ours.items():
        layer = model.get_submodule(name)
        assert count <= lora[name] or layer.r["default"] == 1, name
        assert lora[name] < count + 2 * layer.in_features or layer.r["default"] == layer.out_features, name


def test_a_rank_is_the_same_in_every_layer(tiny_model):
    model = tiny_model("llama")
    adapted = with_new_adapter(model, target_layers(model, "all-linear"), AdapterSettings.build({"r": 4}))
    assert adapted.peft_config["default"].rank_pattern == {}
    assert {one.r["default"] for one in adapted.modules() if isinstance(one, SppLinear)} == {4}


def test_what_is_saved_is_loaded(tiny_model, tmp_path):
    model = tiny_model("llama")
    adapted = with_new_adapter(model, target_layers(model, "q_proj,down_proj,up_proj"), AdapterSettings.build({}))
    ranks = {name: one.r["default"] for name, one in adapted.named_modules() if isinstance(one, SppLinear)}
    assert len(set(ranks.values())) > 1
    assert len(adapted.peft_config["default"].rank_pattern) < len(ranks)  # by the last part of the names
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    assert {name: one.r["default"] for name, one in again.named_modules() if isinstance(one, SppLinear)} == ranks


def test_layers_on_which_an_adapter_has_no_effect_get_none(caplog):
    """Mamba 2's kernel for training takes `out_proj.weight`; attention's projections are layers like others."""
    model = tiny_model_of("bamba")
    with caplog.at_level(logging.WARNING, "spp"):
        targets = target_layers(model, "all-linear")
    assert "model.layers.0.mamba.out_proj: the model reads its weight without calling it" in caplog.text
    assert "model.layers.0.mamba.in_proj" in targets
    assert not [name for name in targets if name.endswith("out_proj")]
    caplog.clear()
    assert set(target_layers(model, "q_proj,in_proj")) == {
        "model.layers.0.mamba.in_proj",
        "model.layers.1.self_attn.q_proj",
    }
    assert not caplog.text
    with pytest.raises(UsageError, match=r"no effect on out_proj: the model reads its weight .*; leave it out"):
        target_layers(model, "out_proj,q_proj")


def test_blocks_that_text_does_not_reach_get_no_adapter(caplog):
    """Llama 3.2 Vision's cross attention, which is called where there is an image."""
    model = whole_model_of("mllama")
    with caplog.at_level(logging.WARNING, "spp"):
        targets = target_layers(model, "all-linear")
    assert "7 linear layers get no adapter" in caplog.text
    assert "the model does not call its block on text" in caplog.text
    assert {name.partition("layers.")[2][0] for name in targets} == {"0", "2"}
    with pytest.raises(UsageError, match=r"no effect on 1.mlp.up_proj: the model does not call its block"):
        target_layers(model, "1.mlp.up_proj")


@pytest.mark.parametrize("family", ["falcon_h1", "mamba2"])
def test_every_factor_is_trained_where_a_fused_kernel_takes_weights(family, monkeypatch):
    """With a stand-in for mamba_ssm's kernel, which transformers calls in training where it is installed, on CUDA."""

    def fused(projected, *_, outproj_weight, outproj_bias=None, **__):
        return F.linear(projected[..., : outproj_weight.shape[1]], outproj_weight, outproj_bias)

    model = tiny_model_of(family)
    module = sys.modules[type(model).__module__]
    (name,) = [name for name in vars(module) if "split_conv1d_scan" in name]
    monkeypatch.setattr(module, name, fused)
    adapted = with_new_adapter(model, target_layers(model, "all-linear"), AdapterSettings.build({"r": 4}))
    tokens = torch.arange(3, 43).view(1, 40)
    adapted.train()(input_ids=tokens, labels=tokens).loss.backward()
    factors = {name: one for name, one in adapted.named_parameters() if one.requires_grad}
    in_proj = [name for name in factors if "in_proj.spp_A" in name]
    assert in_proj
    assert not [name for name, one in factors.items() if one.grad is None]
    assert all(factors[name].grad.any() for name in in_proj)
