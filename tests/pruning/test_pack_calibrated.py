"""`spp pack --bits --calibration`: what calibration gains, resuming, and what it leaves to rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import spp
from spp.checkpoints.checkpoint import Checkpoint
from spp.checkpoints.options import PackOptions
from spp.checkpoints.pack import PackReport
from spp.errors import SppError, UsageError
from spp.models.architecture import prunable_linears
from spp.models.loading import load_model
from spp.options import LoadingOptions
from spp.pruning import pack as pack_module
from spp.pruning.few_bits.quantize import round_to_nearest

Pack = Callable[..., PackReport]


@pytest.fixture
def sparse(tmp_path: Path, tiny_model, tiny_tokenizer) -> Callable[..., Path]:
    """Makes the folder of a model with half of the weights in its linear layers removed."""

    def make(family: str = "llama", **changes: Any) -> Path:
        model = tiny_model(family, dtype=torch.bfloat16, **changes)
        for layer in prunable_linears(model).values():
            weight = layer.get_parameter("weight").data
            weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
        folder = tmp_path / family
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def pack(tmp_path: Path, stories: Path) -> Pack:
    """Pack to tmp_path/archive, calibrated on a few short windows."""

    def call(model: Path, **changes: Any) -> PackReport:
        defaults = {"out": tmp_path / "archive", "bits": 3, "calibration": str(stories), "samples": 8, "window": 32}
        return spp.pack(PackOptions.build({"model": str(model), **defaults, **changes}))

    return call


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(Checkpoint.open(folder).items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_outputs_change_less_than_by_rounding(
    sparse, pack: Pack, tmp_path: Path, stories: Path, tiny_tokenizer, family: str
) -> None:
    """Perplexity says little of a random model, so compare its logits."""
    source = sparse(family)
    report = pack(source)
    pack(source, calibration=None, out=tmp_path / "rounded")
    texts = [json.loads(line)["text"] for line in stories.read_text().splitlines()[:20]]

    def logits(folder: Path) -> torch.Tensor:
        model = load_model(folder, LoadingOptions(device="cpu"))
        with torch.no_grad():
            return torch.cat([model(tiny_tokenizer(text, return_tensors="pt").input_ids).logits[0] for text in texts])

    exact, fed, rounded = (logits(one) for one in (source, report.out, tmp_path / "rounded"))
    assert (fed - exact).square().sum() < (rounded - exact).square().sum()
    verified = spp.verify(spp.VerifyOptions(base=str(source), other=str(report.out)))
    assert verified.verified and verified.in_few_bits == report.packed


def test_the_manifest_says_how_it_was_made(sparse, pack: Pack) -> None:
    report = pack(sparse(), group=64)
    found = json.loads((report.out / "spp.json").read_text())["few_bits"]
    assert (found["bits"], found["group"]) == (3, 64)
    assert found["calibration"]["samples"] == 8 and found["calibration"]["window"] == 32
    assert found["errors_of_outputs"] == report.errors and len(report.errors) == report.packed
    assert all(0 < error < 0.5 for error in report.errors.values()) and found["errors"] == {}


def test_a_stopped_run_goes_on_to_the_same_bits(sparse, pack: Pack, tmp_path: Path, monkeypatch) -> None:
    source = sparse(num_hidden_layers=3)
    whole = pack(source, out=tmp_path / "whole").out
    real, calls = pack_module.QuantizedFiles.write, []

    def stops(self: Any, index: int, quantized: Any) -> Any:
        calls.append(index)
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return real(self, index, quantized)

    monkeypatch.setattr(pack_module.QuantizedFiles, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        pack(source)
    with pytest.raises(UsageError, match="bits was 3 and is 4 now"):
        pack(source, bits=4)
    resumed = pack(source).out
    assert calls == [0, 1, 1, 2]
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == {
        path.name: path.read_bytes() for path in resumed.iterdir()
    }
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_damaged_work_is_named_and_deleted(sparse, pack: Pack, tmp_path: Path, monkeypatch) -> None:
    source = sparse()

    def stops(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "write_archive", stops)
        with pytest.raises(KeyboardInterrupt):
            pack(source)
    (file,) = tmp_path.glob(".*/quantized-0.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(SppError, match="quantized-0.safetensors is not as it was written"):
        pack(source)
    assert pack(source).packed == 14


def test_experts_are_rounded_and_the_rest_is_calibrated(pack: Pack, tmp_path: Path, tiny_tokenizer) -> None:
    config = AutoConfig.for_model("mixtral", **FAMILIES["mixtral"])
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    options = {"model": str(tmp_path / "dense"), "out": tmp_path / "pruned", "criterion": "magnitude"}
    spp.prune(spp.PruneOptions.build(options))
    report = pack(tmp_path / "pruned")
    found = json.loads((report.out / "spp.json").read_text())["few_bits"]
    assert found["errors"] and all("expert" in name for name in found["errors"])
    assert found["errors_of_outputs"] and not any("expert" in name for name in found["errors_of_outputs"])
    before, after = tensors(tmp_path / "pruned"), tensors(report.out)
    for name in found["errors"]:
        assert after[name].equal(round_to_nearest(before[name], 3, 128).values().to(after[name].dtype))


def test_what_is_refused_leaves_nothing(sparse, pack: Pack, tmp_path: Path) -> None:
    source = sparse()
    with pytest.raises(UsageError, match="missing.txt"):
        pack(source, calibration=str(tmp_path / "missing.txt"))
    (path,) = source.glob("*.safetensors")
    changed = load_file(path)
    changed["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(changed, path, {"format": "pt"})
    with pytest.raises(SppError, match="layers.1.*NaN or infinity"):
        pack(source)
    assert not (tmp_path / "archive").exists()
