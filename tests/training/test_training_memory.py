"""The memory of a training run: foretold within 10 % of what is measured, and checkpointing where it would not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.baselines.finetuning import MaskedWeight, replace_linears
from spp.checkpoints.json_files import read_json, write_json
from spp.errors import SppError
from spp.models.architecture import prunable_linears
from spp.models.pack_model import pack_
from spp.models.trainable_values import trainable_values
from spp.runtime.tensor_memory import LiveBytes
from spp.training import memory_estimate
from spp.training.memory_estimate import predict_training
from spp.training.options import TrainOptions
from spp.training.train import train
from spp.training.trainer_arguments import training_arguments


@pytest.fixture
def request_for(tmp_path, tiny_model, tiny_tokenizer, stories):
    """A function that saves a sparse Llama, and gives the values of options to train on it."""

    def make(sparsity=0.75, **sizes):
        model = tiny_model("llama", dtype=torch.bfloat16, **sizes)
        generator = torch.Generator().manual_seed(0)
        for layer in prunable_linears(model).values():
            layer.weight.data[torch.rand(layer.weight.shape, generator=generator) < sparsity] = 0
        model.save_pretrained(tmp_path / "model")
        tiny_tokenizer.save_pretrained(tmp_path / "model")
        return {
            "model": str(tmp_path / "model"),
            "out": str(tmp_path / "adapter"),
            "data": str(stories),
            "device": "cpu",
            "join_documents": True,
            "max_steps": 2,
        }

    return make


def test_live_bytes_by_hand():
    before = torch.ones(50)
    with LiveBytes() as live:
        view = before.view(5, 10)
        assert live.now == 0 and len(view) == 5
        a = torch.ones(1000)
        b = a.view(10, 100) + 1  # the view is nothing new
        assert live.now == 8000
        del a
        assert live.now == 4000
        c = b * 2
        del b
    assert (live.now, live.peak) == (c.nbytes, 8000)


def test_the_parts_that_can_be_counted_by_hand(request_for):
    shape = {"window": 48, "r": 4, "directions": 2, "batch_size": 6}
    options = TrainOptions.build({**request_for(0.5), **shape, "dtype": "float32"})
    report = predict_training(options)
    linears = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    assert report.parts["embeddings, head, norms"] == 4 * (2 * 96 * 32 + 5 * 32)
    adapter = 2 * (2 * (8 * 32 + 64) + 2 * (8 * 32 + 32) + 2 * (8 * 32 + 96) + (8 * 48 + 64))
    assert report.parts["adapter"] == 4 * adapter and report.parts["optimizer"] == 8 * adapter
    if report.packed:
        assert report.packed == 14
        assert 0.5 * 2 * linears < report.parts["packed weights"] < 0.8 * 2 * linears
    assert (report.sequences, report.tokens) == (6, 48)
    assert not report.gradient_checkpointing
    unpacked = predict_training(TrainOptions.build({**options.model_dump(), "pack": False}))
    assert unpacked.parts["dense weights"] == 4 * linears and unpacked.packed == 0
    for kind, entry in (("nf4", 0.5), ("int8", 1.0)):
        quantized = predict_training(TrainOptions.build({**options.model_dump(), "quantize": kind}))
        assert entry * linears < quantized.parts["quantized weights"] < (entry + 0.2) * linears
        assert quantized.packed == 0 and quantized.parts["a weight, dequantized"] == 4 * 32 * 48


def test_the_parts_of_full_training_are_those_of_its_survivors(request_for):
    values = {**request_for(0.5), "window": 48, "method": "full", "batch_size": 6}
    report = predict_training(TrainOptions.build(values))
    linears = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    survivors = report.parts["optimizer"] / 8
    assert 0.4 * linears < survivors < 0.6 * linears and report.packed == 14
    bits = 4 * (192 * 1 + 32 * 2)  # of a block: rows of 32 columns take a word, those of 48 two
    offsets = 8 * (192 + 32 + 7)
    assert report.parts["packed weights"] == 4 * survivors + 2 * (bits + offsets)
    assert report.parts["activations and gradients"] > 4 * survivors and "adapter" not in report.parts
    few = predict_training(TrainOptions.build({**values, "target_modules": "q_proj"}))
    assert few.parts["optimizer"] < 0.3 * report.parts["optimizer"]


def test_a_full_step_takes_a_fraction_of_masked_trainings_memory():
    """At 75 %, everything counted: weights, gradients, moments, and what lives within the step; computed in bf16."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=64, use_cache=False, **sizes)

    def peak(prepare):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16).train()
        for layer in prunable_linears(model).values():
            layer.weight.data[torch.rand(layer.weight.shape) < 0.75] = 0
        model.requires_grad_(False)
        model = prepare(model)
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], fused=True)
        ids = torch.arange(32)[None]
        with LiveBytes() as live:
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        held = {one.untyped_storage()._cdata: one.nbytes for one in (*model.parameters(), *model.buffers())}
        return live.peak + sum(held.values())

    def ours(model):
        trainable_values(pack_(model))
        return model

    assert peak(ours) < 0.35 * peak(lambda model: replace_linears(model, MaskedWeight))


SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 8000,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 256, "batch_size": 4},
        {"window": 512, "batch_size": 4, "gradient_checkpointing": True},
        {"window": 256, "batch_size": 4, "pack": False},
        {"window": 256, "batch_size": 4, "dtype": "bfloat16"},
        {"window": 256, "batch_size": 4, "method": "full"},
    ],
    ids=["plain", "checkpointed", "unpacked", "bfloat16", "full"],
)
@pytest.mark.slow
def test_the_prediction_is_within_ten_percent_of_the_measurement(request_for, changes):
    """A Llama of 67 million parameters; both commands in processes of their own."""
    values = {**request_for(**SIZES), **changes}
    model, out = values.pop("model"), values.pop("out")
    flags = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag if value else "--no-" + flag[2:]] if isinstance(value, bool) else [flag, str(value)]

    def told(*more):
        command = [sys.executable, "-m", "spp", "train", model, out, "--json", *flags, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    predicted = sum(told("--dry-run")["parts"].values())
    measured = told()["peak_memory_bytes"]
    assert abs(predicted / measured - 1) < 0.1, (predicted / 2**20, measured / 2**20)


def test_checkpointing_comes_on_where_the_batch_would_not_fit(request_for, monkeypatch, tmp_path):
    options = TrainOptions.build({**request_for(), "window": 48})
    needed = sum(count for part, count in predict_training(options).parts.items() if part != "Python and libraries")
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda device: needed)
    assert predict_training(options).gradient_checkpointing
    asked = []
    monkeypatch.setattr(
        "spp.training.training_run.training_arguments",
        lambda *args, **kwargs: asked.append(kwargs["gradient_checkpointing"]) or training_arguments(*args, **kwargs),
    )
    train(options)
    never = TrainOptions.build({**options.model_dump(), "gradient_checkpointing": False, "out": tmp_path / "never"})
    train(never)
    assert asked == [True, False]


@pytest.mark.filterwarnings("ignore:.*rope")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_parameters": {"rope_type": "odd", "rope_theta": 1e4}}, "knows no rope_parameters.rope_type 'odd'"),
        ({"hidden_act": "none_such"}, "knows no hidden_act 'none_such'"),
        ({"num_hidden_layers": 10**7}, "config.json says 10000000 layers"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(request_for, changes, reason):
    options = TrainOptions.build(request_for())
    path = Path(options.model) / "config.json"
    write_json(path, {**read_json(path), **changes})
    with pytest.raises(SppError, match=reason):
        predict_training(options)
