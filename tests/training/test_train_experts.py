"""Training of stacked experts with `spp train`: which of them, what is reported, and what is foretold."""

from __future__ import annotations

import json
import logging

import pytest
from families import tiny_model_of
from safetensors.torch import load_file

from spp.adapters.spp_format import read_adapter
from spp.cli.entry_point import main
from spp.errors import UsageError
from spp.models.experts import stacks_in
from spp.training.memory_estimate import predict_training
from spp.training.options import TrainOptions
from spp.training.train import train

STACKS = {f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")}


@pytest.fixture
def request_for(tmp_path, tiny_tokenizer, stories):
    """The values of options to train on a family, whose experts alone are half zeros."""

    def make(family="mixtral", **changes):
        model = tiny_model_of(family)
        for stack in stacks_in(model).values():
            stack.weight.data[..., ::2] = 0
        model.save_pretrained(tmp_path / "model")
        tiny_tokenizer.save_pretrained(tmp_path / "model")
        values = {"model": str(tmp_path / "model"), "out": str(tmp_path / "adapter"), "data": str(stories)}
        return {**values, "device": "cpu", "window": 32, "max_steps": 4, "learning_rate": 0.1, **changes}

    return make


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_pruned_experts_are_trained_by_default(request_for, tmp_path, family, checkpointing, caplog):
    values = request_for(family, gradient_checkpointing=checkpointing)
    with caplog.at_level(logging.WARNING, "spp"):
        report = train(TrainOptions.build(values))
    found = read_adapter(tmp_path / "adapter").factors
    assert {name for name, one in found.items() if one.of_experts} == STACKS
    assert all(one.A.any() for one in found.values())
    assert report.losses[-1][1] < report.losses[0][1]
    assert "spp convert" not in (tmp_path / "adapter" / "README.md").read_text()  # HiRA has no place for experts
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert report.trainable_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert 0.2 < report.sparsity < 0.5  # half of the experts, which are most of the adapted weights
    assert "get no adapter" not in caplog.text and "IS DENSE" not in caplog.text


def test_experts_alone_and_the_memory_for_them(request_for, tmp_path):
    values = request_for(target_modules="down_proj", r=3, directions=2)
    options = TrainOptions.build(values)
    predicted = predict_training(options)
    report = train(options)
    found = read_adapter(tmp_path / "adapter").factors
    assert set(found) == {name for name in STACKS if name.endswith("down_proj")}
    assert report.trainable_parameters == 2 * 4 * (3 * 2 * 48 + 32 * 2)
    assert report.sparsity == 0.5
    assert predicted.parts["adapter"] == 4 * report.trainable_parameters
    everything = predict_training(TrainOptions.build({**values, "target_modules": "all-linear"}))
    again = train(TrainOptions.build({**values, "target_modules": "all-linear", "overwrite": True}))
    assert everything.parts["adapter"] == 4 * again.trainable_parameters


def test_names_of_stacks_are_known_to_target_modules(request_for):
    with pytest.raises(UsageError, match="no up_proj; its linear layers are down_proj, gate_up_proj, k_proj"):
        train(TrainOptions.build(request_for(target_modules="up_proj")))


def test_experts_are_in_the_whole_life_of_the_command_line(request_for, tmp_path, capsys):
    values = request_for()
    flags = [part for name in ("data", "device") for part in (f"--{name}", values[name])]
    adapter, out = values["out"], str(tmp_path / "merged")
    assert main(["train", values["model"], adapter, *flags, "--window", "32", "--max-steps", "2", "--json"]) == 0
    assert main(["merge", values["model"], adapter, out, "--json"]) == 0
    capsys.readouterr()
    assert main(["verify", values["model"], out, "--pattern", "50%", "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["verified"] and verified["matrices_checked"] == 2 * 4 * 3
    generate = [
        "generate",
        values["model"],
        "--prompt",
        "The cat",
        "--adapter",
        adapter,
        "--max-new-tokens",
        "4",
        "--json",
    ]
    assert main([*generate, "--device", "cpu"]) == 0
    with_adapter = json.loads(capsys.readouterr().out)
    assert main(["generate", out, "--prompt", "The cat", "--max-new-tokens", "4", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == with_adapter["text"]
