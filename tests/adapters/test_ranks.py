"""How large an adapter is on each layer, and that its config says so."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from spp import SppConfig
from spp.adapters.options import AdapterSettings
from spp.adapters.tuner import SppLinear
from spp.adapters.tuner.ranks import like_lora
from spp.training.new_adapter import target_layers, with_new_adapter


def test_as_many_row_groups_as_lora_has_parameters_for():
    assert like_lora(4, 4, 1, 2) == 3  # 3 * 4 + 4 = 16 = 2 * (4 + 4)
    assert like_lora(10, 4, 1, 2) == 4  # 4 * 4 + 10 = 26 <= 28
    assert like_lora(4, 10, 1, 2) == 2  # 2 * 10 + 4 = 24 <= 28
    assert like_lora(2, 100, 1, 64) == 2  # no more than there are rows
    assert like_lora(100, 2, 4, 1) == 1  # no fewer than one
    assert like_lora(10, 10, 2, 4) == 3  # 3 * 2 * 10 + 2 * 10 = 80 = 4 * (10 + 10)
    assert (like_lora(4096, 4096, 1, 16), like_lora(4096, 4096, 4, 16)) == (31, 7)


def ranks(model: nn.Module, adapter: str = "default") -> dict[str, int]:
    """R of every layer that has the adapter."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SppLinear)}
    return {name: layer.r[adapter] for name, layer in layers.items() if adapter in layer.r}


@pytest.mark.parametrize("settings", [{}, {"r": 3}, {"lora_rank": 4, "directions": 2, "init_weights": "published"}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_same_settings_are_the_same_adapter_in_peft_and_in_spp_train(tiny_model, family, settings):
    model, twin = tiny_model(family), tiny_model(family)
    torch.manual_seed(0)
    by_peft = get_peft_model(model, SppConfig(**settings, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    by_us = with_new_adapter(twin, target_layers(twin, "all-linear"), AdapterSettings.build(settings))
    assert ranks(by_us) == ranks(by_peft)
    ours, theirs = by_us.state_dict(), by_peft.state_dict()
    assert ours.keys() == theirs.keys() and any(".spp_A." in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if ".spp_" in name)
    differing = {"target_modules", "base_model_name_or_path"}  # the same modules, named in two ways
    one, other = (
        {name: value for name, value in adapted.peft_config["default"].to_dict().items() if name not in differing}
        for adapted in (by_us, by_peft)
    )
    assert one == other


def test_the_settings_have_one_default_and_one_description():
    described = {field.name: field for field in fields(SppConfig)}
    for name, option in AdapterSettings.model_fields.items():
        if name != "target_modules":  # a string of names for a command, also a list or an expression for PEFT
            assert described[name].default == option.default
            assert described[name].metadata["help"].startswith(option.description)


def test_what_the_budget_gave_is_saved_and_loaded(tiny_model, tmp_path):
    adapted = get_peft_model(tiny_model("llama"), SppConfig(task_type="CAUSAL_LM"))
    assert len(set(ranks(adapted).values())) > 1
    adapted.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert isinstance(saved["r"], int) and saved["rank_pattern"]
    again = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    assert ranks(again) == ranks(adapted)


class Two(nn.Module):
    """Layers of different sizes that share the last part of their names, and the end of the whole name."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 8)
        self.deep = nn.ModuleDict({"proj": nn.Linear(8, 64)})

    def forward(self, x):
        return self.deep["proj"](self.proj(x))


def test_layers_that_share_a_name_keep_their_own_ranks(tmp_path):
    config = SppConfig(lora_rank=4, directions=1, target_modules=["proj"])
    adapted = get_peft_model(Two(), config)
    expected = {"proj": like_lora(8, 64, 1, 4), "deep.proj": like_lora(64, 8, 1, 4)}
    assert len(set(expected.values())) == 2
    assert ranks(adapted.base_model.model) == expected
    adapted.save_pretrained(tmp_path)
    assert ranks(PeftModel.from_pretrained(Two(), str(tmp_path)).base_model.model) == expected


def test_a_rank_pattern_goes_before_the_budget():
    adapted = get_peft_model(Two(), SppConfig(rank_pattern={"deep.proj": 3}, target_modules=["proj"]))
    assert ranks(adapted.base_model.model) == {"proj": like_lora(8, 64, 4, 16), "deep.proj": 3}


def test_a_second_adapter_has_ranks_of_its_own():
    adapted = get_peft_model(Two(), SppConfig(r=2, target_modules=["proj"]))
    adapted.add_adapter("other", SppConfig(lora_rank=4, directions=1, target_modules=["proj"]))
    assert set(ranks(adapted.base_model.model).values()) == {2}
    assert ranks(adapted.base_model.model, "other") == {"proj": like_lora(8, 64, 1, 4), "deep.proj": 28}
