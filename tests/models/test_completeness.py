"""A model's files and its config.json belong together, or one sentence says in what they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spp.checkpoints.json_files import read_json, write_json
from spp.cli.entry_point import main

WEIGHTS = "model.safetensors"
LAYER = "model.layers.1.mlp.up_proj.weight"


def changed_config(folder: Path, **values: object) -> None:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **values})


def commands(model: Path, text: Path, out: Path) -> list[list[str]]:
    return [
        ["prune", str(model), str(out), "--criterion", "magnitude"],
        ["prune", str(model), str(out), "--calibration", str(text), "--dry-run"],
        ["eval", str(model), "--text", str(text), "--window", "16"],
        ["train", str(model), str(out), "--data", str(text), "--max-steps", "1"],
        ["train", str(model), str(out), "--data", str(text), "--max-steps", "1", "--no-pack"],
        ["generate", str(model), "--prompt", "a"],
    ]


def refusals(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What each command says; all have to fail in one sentence, and leave nothing."""
    said = []
    for words in commands(model, text, tmp_path / "out"):
        capsys.readouterr()
        assert main(words) == 1, words
        said.append(capsys.readouterr().err)
        assert said[-1].count("error: ") == 1 and not (tmp_path / "out").exists()
    return said


@pytest.mark.parametrize("layers", [0, -1])
def test_a_number_of_layers_that_no_model_has(tiny_checkpoint, stories, tmp_path, capsys, layers):
    changed_config(tiny_checkpoint, num_hidden_layers=layers)
    said = refusals(tiny_checkpoint, stories, tmp_path, capsys)
    assert all(f"num_hidden_layers {layers}; a model has 1 or more" in one for one in said)


@pytest.mark.parametrize("layers", [3, 10**7])
def test_more_layers_than_the_files_hold(tiny_checkpoint, stories, tmp_path, capsys, layers):
    changed_config(tiny_checkpoint, num_hidden_layers=layers)
    said = refusals(tiny_checkpoint, stories, tmp_path, capsys)
    assert all(f"config.json says {layers} layers, and the files hold 2" in one for one in said)


def test_a_vocabulary_that_the_files_cannot_hold(tiny_checkpoint, stories, tmp_path, capsys):
    changed_config(tiny_checkpoint, vocab_size=10**9, hidden_size=4096)
    said = refusals(tiny_checkpoint, stories, tmp_path, capsys)
    assert all("config.json says 1000000000 tokens of 4096 features" in one for one in said)


def test_fewer_layers_than_the_files_hold(tiny_checkpoint, stories, tmp_path, capsys):
    changed_config(tiny_checkpoint, num_hidden_layers=1)
    said = refusals(tiny_checkpoint, stories, tmp_path, capsys)
    assert all("weights that config.json leaves out, e.g. model.layers.1." in one for one in said if "dry" not in one)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", LAYER])
def test_a_weight_that_is_missing(tiny_checkpoint, stories, tmp_path, capsys, name):
    tensors = load_file(tiny_checkpoint / WEIGHTS)
    del tensors[name]
    save_file(tensors, tiny_checkpoint / WEIGHTS, metadata={"format": "pt"})
    for one in refusals(tiny_checkpoint, stories, tmp_path, capsys):
        assert "lacks" in one and name.removesuffix(".weight") in one


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_floats(tiny_checkpoint, stories, tmp_path, capsys, dtype):
    """What the numbers mean is not known, where config.json does not say it."""
    tensors = load_file(tiny_checkpoint / WEIGHTS)
    tensors[LAYER] = tensors[LAYER].to(dtype)
    save_file(tensors, tiny_checkpoint / WEIGHTS, {"format": "pt"})
    for message in refusals(tiny_checkpoint, stories, tmp_path, capsys):
        assert f"1 weights are no floats, e.g. {LAYER}" in message


def test_buffers_and_copies_of_a_tied_head_are_harmless(tiny_checkpoint, stories, tmp_path):
    tensors = load_file(tiny_checkpoint / WEIGHTS)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"].clone()
    changed_config(tiny_checkpoint, tie_word_embeddings=True)
    save_file(tensors, tiny_checkpoint / WEIGHTS, metadata={"format": "pt"})
    assert main(commands(tiny_checkpoint, stories, tmp_path / "out")[0]) == 0
    assert main(commands(tiny_checkpoint, stories, tmp_path / "out")[2]) == 0
