"""Quantized sparse bases: zeros are exact, gradients are those of the dequantized weight, nothing dense is kept."""

from __future__ import annotations

import weakref

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

import spp
from spp.adapters.merge import merge
from spp.adapters.options import MergeOptions
from spp.checkpoints.options import VerifyOptions
from spp.checkpoints.verify import verify
from spp.errors import SppError, UsageError
from spp.models.architecture import prunable_linears
from spp.models.quantized import dequantized, is_quantized, made_again, quantize_
from spp.ops import reference
from spp.pruning.options import PruneOptions
from spp.pruning.prune import prune
from spp.training.options import TrainOptions
from spp.training.progress_callback import TrainingProgress
from spp.training.train import train

KINDS = ["nf4", "int8"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture
def sparse(tiny_model):
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    torch.manual_seed(0)
    for layer in prunable_linears(model).values():
        layer.weight.data[torch.rand_like(layer.weight) < 0.5] = 0.0
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_are_exact_and_the_rest_is_near(sparse, kind):
    dense = {name: layer.weight.clone() for name, layer in prunable_linears(sparse).items()}
    made = quantize_(sparse, prunable_linears(sparse), kind, CPU)
    assert made.keys() == dense.keys()
    for name, layer in made.items():
        assert sparse.get_submodule(name) is layer and is_quantized(layer)
        found, weight = dequantized(layer, torch.float32), dense[name]
        assert not found[weight == 0].any()
        error = (found - weight).norm() / weight.norm()
        assert error < (0.02 if kind == "int8" else 0.15)
        assert layer.weight.nbytes == weight.numel() * (1 if kind == "int8" else 0.5)


def test_a_quantization_that_loses_zeros_is_refused(sparse, monkeypatch):
    monkeypatch.setattr("spp.models.quantized.dequantized", lambda layer, dtype: torch.ones(layer.out_features, 64))
    first = dict(list(prunable_linears(sparse).items())[:1])
    with pytest.raises(SppError, match=r"q_proj: \d+ zeros would not be zeros after quantization with nf4"):
        quantize_(sparse, first, "nf4", CPU)


@pytest.mark.parametrize("method", ["spp", "full"])
def test_moments_in_8_bits_train_and_resume(tmp_path, tiny_checkpoint, tiny_model, stories, monkeypatch, method):
    tiny_model("llama", hidden_size=128, intermediate_size=128).save_pretrained(tiny_checkpoint)
    spp.prune(spp.PruneOptions.build({"model": str(tiny_checkpoint), "out": tmp_path / "pruned", "samples": 4}))
    values = {"model": str(tmp_path / "pruned"), "data": str(stories), "window": 48, "max_steps": 8, "save_steps": 3}
    values |= {"method": method, "learning_rate": 0.02, "dtype": "float32", "device": "cpu", "warmup_ratio": 0}
    values |= {"r": 32} if method == "spp" else {}  # bitsandbytes has moments of less than 4096 entries in fp32
    whole = train(spp.TrainOptions.build({**values, "out": tmp_path / "whole", "optimizer": "adamw-8bit"}))
    usual = train(spp.TrainOptions.build({**values, "out": tmp_path / "usual"}))
    losses, others = ([loss for _, loss in report.losses] for report in (whole, usual))
    assert losses == pytest.approx(others, rel=0.02) and losses != others and losses[-1] < losses[0]

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    again = spp.TrainOptions.build({**values, "out": tmp_path / "again", "optimizer": "adamw-8bit"})
    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "on_log", on_log)
        with pytest.raises(KeyboardInterrupt):
            train(again)
    assert train(again).losses[3:] == whole.losses[3:]


@pytest.mark.parametrize("mode", ["fused", "split"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dequantized_weight(kind, mode, dropout):
    torch.manual_seed(0)
    host = nn.Module()
    host.layer = nn.Linear(64, 96)
    host.layer.weight.data[torch.rand(96, 64) < 0.5] = 0.0
    host.set_submodule = lambda name, layer: setattr(host, name, layer)  # pyright: ignore[reportAttributeAccessIssue]
    quantize_(host, {"layer": host.layer}, kind, CPU)  # pyright: ignore[reportArgumentType]
    weight = dequantized(host.layer, torch.float32)
    config = spp.SppConfig(r=4, mode=mode, dropout=dropout, init_weights=False, target_modules=["layer"])
    layer = get_peft_model(host, config).base_model.model.layer
    x = torch.randn(5, 64, requires_grad=True)
    torch.manual_seed(1)
    layer(x).square().sum().backward()
    A, B = (factor["default"].weight for factor in (layer.spp_A, layer.spp_B))
    found = [x.grad, A.grad, B.grad]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, A, B)]
    torch.manual_seed(1)
    if dropout:
        y = torch.nn.functional.linear(leaves[0], weight, layer.bias)
        dropped = torch.nn.functional.dropout(leaves[0], dropout)
        y = y + reference.adapter_linear(dropped, weight, *leaves[1:], 2.0)
    else:
        y = reference.spp_linear(leaves[0], weight, *leaves[1:], 2.0, layer.bias)
    y.square().sum().backward()
    # With dropout, bitsandbytes computes the base layer, with int8 in its own arithmetic.
    tolerance = 2e-2 if dropout else 1e-4
    for ours, theirs in zip(found, (leaf.grad for leaf in leaves), strict=True):
        assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_no_dequantized_weight_waits_for_backward():
    weight, A, B = torch.randn(300, 200), torch.zeros(3, 200), torch.ones(300, 1)
    x, asked = torch.randn(4, 200, requires_grad=True), []

    def again():
        asked.append(True)
        return torch.ones(300, 200)

    with made_again(weight, again):
        y = spp.spp_linear(x, weight, A, B, 1.0)
    freed = weakref.ref(weight)
    del weight
    assert freed() is None and not asked
    y.sum().backward()
    assert asked == [True] and x.grad.equal(torch.full_like(x, 300.0))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trained_on_a_quantized_base_merges_with_every_zero_kept(tiny_checkpoint, stories, tmp_path, kind):
    prune(PruneOptions.build({"model": str(tiny_checkpoint), "out": tmp_path / "pruned", "criterion": "magnitude"}))
    values = {"model": str(tmp_path / "pruned"), "out": tmp_path / "adapter", "data": str(stories), "window": 48}
    values |= {"learning_rate": 0.1, "max_steps": 12, "lora_rank": 4}
    report = train(TrainOptions.build({**values, "quantize": kind}))
    assert report.losses[-1][1] < report.losses[0][1] and report.packed == 0
    assert 0.49 < report.sparsity < 0.51  # of what was pruned, not of what was rounded to zero on top
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(factor.dtype == torch.float32 for factor in factors.values())
    options = {"model": values["model"], "adapter": tmp_path / "adapter", "out": tmp_path / "merged"}
    merge(MergeOptions.build(options))
    proof = verify(VerifyOptions.build({"base": values["model"], "other": str(tmp_path / "merged"), "pattern": "2:4"}))
    assert proof.verified


def test_a_quantized_layer_is_not_merged(sparse):
    quantize_(sparse, prunable_linears(sparse), "nf4", CPU)
    adapted = get_peft_model(sparse, spp.SppConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="merge into the model as it was before"):
        adapted.merge_adapter()


@pytest.mark.parametrize("other", [{"pack": True}, {"sharding": "fsdp"}])
def test_options_that_exclude_quantize_are_refused(other):
    with pytest.raises(UsageError, match="quantize nf4 does not go with"):
        TrainOptions.build({"model": "m", "out": "o", "quantize": "nf4", **other})


def test_gpt2s_layers_are_refused(tiny_model):
    model = tiny_model("gpt2")
    with pytest.raises(UsageError, match="is a Conv1D; leave out --quantize"):
        quantize_(model, prunable_linears(model), "nf4", CPU)
