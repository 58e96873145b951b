"""The memory of a training run: foretold within 10 % of what is measured, and checkpointing where it would not fit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from spp.models.architecture import prunable_linears
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


@pytest.mark.parametrize(
    ("a", "b", "ends"),
    [
        ((8, 16), (2, 32, 16), [3, 8]),
        ((16, 8), (32, 8), [3, 8]),
        ((2, 16, 32), (8, 32), [3, 8]),
        ((2, 8, 16),) * 2 + (None,),
    ],
    ids=["forward", "of the weights", "of the other side", "batched"],
)
def test_grouped_products_are_counted_in_every_dtype(a, b, ends):
    """torch's fake version of them, which experts are computed with, knows bfloat16 alone."""
    offsets = ends and torch.tensor(ends, dtype=torch.int32)
    real = torch._grouped_mm(
        torch.ones(a, dtype=torch.bfloat16), torch.ones(b, dtype=torch.bfloat16).transpose(-1, -2), offs=offsets
    )
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        fake = torch._grouped_mm(torch.ones(a), torch.ones(b).transpose(-1, -2), offs=offsets)
    assert fake.shape == real.shape and fake.dtype == torch.float32
    assert live.now >= fake.nbytes


def test_the_parts_that_can_be_counted_by_hand(request_for):
    options = TrainOptions.build({**request_for(0.5), "window": 48, "r": 4, "directions": 2, "batch_size": 6})
    report = predict_training(options)
    linears = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    assert report.parts["embeddings, head, norms"] == 4 * (2 * 96 * 32 + 5 * 32)  # computed in fp32 on a CPU
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
    ],
    ids=["plain", "checkpointed", "unpacked", "bfloat16"],
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
