"""Where adapters go, and how large they are."""

from __future__ import annotations

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import spp
from spp.adapters.options import AdapterSettings
from spp.adapters.tuner.layer import SppLinear
from spp.models.architecture import prunable_linears
from spp.training.new_adapter import like_lora, target_layers, with_new_adapter


def test_as_many_row_groups_as_lora_has_parameters_for():
    assert like_lora(4, 4, 1, 2) == 3  # 3 * 4 + 4 = 16 = 2 * (4 + 4)
    assert like_lora(10, 4, 1, 2) == 4  # 4 * 4 + 10 = 26 <= 28
    assert like_lora(4, 10, 1, 2) == 2  # 2 * 10 + 4 = 24 <= 28
    assert like_lora(2, 100, 1, 64) == 2  # no more than there are rows
    assert like_lora(100, 2, 4, 1) == 1  # no fewer than one
    assert like_lora(10, 10, 2, 4) == 3  # 3 * 2 * 10 + 2 * 10 = 80 = 4 * (10 + 10)
    assert (like_lora(4096, 4096, 1, 16), like_lora(4096, 4096, 4, 16)) == (31, 7)


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
    adapted = with_new_adapter(model, target_layers(model, "all-linear"), AdapterSettings.build({"rank": 4}))
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
