"""Random models of any size: they load, have the size and the pattern asked for, and go through a merge."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.make_synthetic_model import Geometry, Rows, geometry, main
from spp.adapters.merge import merge
from spp.adapters.options import MergeOptions
from spp.checkpoints.checkpoint import INDEX, Checkpoint
from spp.patterns import parse_pattern

FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX}


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "model"


def make(out: Path, *arguments: str, gigabytes: str = "0.001") -> Path:
    assert main(["--gigabytes", gigabytes, *arguments, str(out)]) == 0
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(Checkpoint.open(folder).items())


def test_a_tiny_model_loads_and_computes(out):
    make(out, "--shard-gigabytes", "0.0003")
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert model.config.max_position_embeddings == 2048
    assert model.config.num_hidden_layers >= 4
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "Any text, ça va? \n\t 你好 🙂"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    assert len(tokenizer) <= model.config.vocab_size
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all()


def test_the_folder_is_what_transformers_saves(out):
    make(out, "--shard-gigabytes", "0.0003")
    shards = sorted(out.glob("*.safetensors"))
    assert {path.name for path in out.iterdir()} == FILES | {path.name for path in shards}
    assert [path.name for path in shards] == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, 5)]
    assert all(path.stat().st_size <= 0.0003e9 + 10_000 for path in shards)
    index = json.loads((out / INDEX).read_text())
    held = {name: path.name for path in shards for name in load_file(path)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in weights(out).values())
    assert index["metadata"]["total_size"] == pytest.approx(1e6, rel=0.03)


def test_weights_are_those_of_a_model_before_training(out):
    found = weights(make(out))
    matrices = [one.float() for one in found.values() if one.ndim == 2]
    for one in matrices:
        assert one.std() == pytest.approx(0.02, rel=0.05)
        assert abs(one.mean()) < 0.001
    assert all((one == 1).all() for one in found.values() if one.ndim == 1)
    for one, other in combinations(matrices, 2):
        assert one.shape != other.shape or not one.equal(other)


@pytest.mark.parametrize("text", ["2:4", "1:4", "2:8", "50%", "37.5%"])
def test_linears_of_the_decoder_have_the_pattern_exactly(out, text):
    pattern = parse_pattern(text)
    found = weights(make(out, "--sparse", text))
    for name, one in found.items():
        if not name.endswith("_proj.weight"):
            assert (one != 0).all(), name
            continue
        assert pattern.violations(one) == 0
        removed = pattern.removed_of(one.shape[1]) if text.endswith("%") else int(one.shape[1] * pattern.sparsity)
        assert ((one == 0).sum(dim=1) == removed).all(), name
    linears = [one for name, one in found.items() if name.endswith("_proj.weight")]
    assert not any(one.shape == other.shape and one.equal(other) for one, other in combinations(linears, 2))


def test_rows_go_on_where_a_matrix_has_more_than_were_drawn(monkeypatch):
    monkeypatch.setattr("scripts.make_synthetic_model._DRAWN", 3 * 16)
    rows = Rows(16, 100, 0, parse_pattern("2:4"))
    matrix = rows.matrix(10)
    assert parse_pattern("2:4").violations(matrix) == 0
    assert ((matrix == 0).sum(dim=1) == 8).all()
    assert len({tuple(row.tolist()) for row in matrix}) == 10
    assert not rows.matrix(10).equal(matrix)


def test_the_seed_decides(tmp_path):
    seeds = {"first": "1", "again": "1", "other": "2"}
    first, again, other = (weights(make(tmp_path / name, "--seed", seed)) for name, seed in seeds.items())
    assert all(one.equal(again[name]) for name, one in first.items())
    assert not any(one.equal(other[name]) for name, one in first.items() if one.ndim == 2)


def test_its_adapter_merges_and_loads(out, tmp_path):
    adapter = tmp_path / "adapter"
    make(out, "--sparse", "2:4", "--adapter", str(adapter))
    report = merge(MergeOptions(model=str(out), adapter=adapter, out=tmp_path / "merged"))
    assert report.verified
    assert report.tensors.keys() == {name for name in weights(out) if name.endswith("_proj.weight")}
    assert report.unchanged_share < 0.2
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), adapter)  # warns of missing factors
    folded = model.merge_and_unload().state_dict()
    assert all(one.equal(folded[name]) for name, one in weights(tmp_path / "merged").items())


@pytest.mark.parametrize("gigabytes", [0.0002, 0.001, 0.003, 0.02, 0.1, 0.15, 0.6, 1, 2, 3.9, 4, 4.6, 5, 13.5, 26, 140])
def test_sizes(gigabytes):
    found = geometry(gigabytes)
    assert found.layers >= 4
    assert found.nbytes == pytest.approx(gigabytes * 1e9, rel=0.06 if gigabytes >= 4 else 0.03)
    assert found.hidden % 32 == found.intermediate % 32 == 0
    if gigabytes >= 4:
        assert (found.hidden, found.intermediate, found.vocabulary) == (4096, 11008, 32000)
    config = found.config()
    assert config.hidden_size % config.num_attention_heads == 0


def test_thirteen_and_a_half_gigabytes_are_the_published_model():
    assert geometry(13.48) == Geometry(hidden=4096, intermediate=11008, layers=32, vocabulary=32000)
    assert geometry(13.48).nbytes == 2 * 6_738_415_616
    assert geometry(13.48).config().num_attention_heads == 32


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--gigabytes", "0"], "--gigabytes must be a number above 0, but it is 0"),
        (["--gigabytes", "nan", "--shard-gigabytes", "-1"], "--shard-gigabytes must be a number above 0, but it is -1"),
        (["--gigabytes", "0.0001"], "is too little for a Llama; give at least 0.0002"),
        (["--gigabytes", "0.001", "--sparse", "2:5"], "--sparse 2:5 does not fit matrices of 64 columns"),
        (["--gigabytes", "0.001", "--sparse", "half"], "pattern 'half' is not understood"),
        (["--gigabytes", "1e9"], "the disk has"),
    ],
)
def test_what_cannot_be_is_one_error(arguments, complaint, out, capsys):
    assert main([*arguments, str(out)]) == 2
    assert complaint in capsys.readouterr().err
    assert not list(out.parent.iterdir())


def test_nothing_is_overwritten(out, tmp_path, capsys):
    out.mkdir()
    (out / "mine").write_text("mine")
    assert main(["--gigabytes", "0.001", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine"]
    free = tmp_path / "free"
    assert main(["--gigabytes", "0.001", "--adapter", str(out), str(free)]) == 2
    assert main(["--gigabytes", "0.001", "--adapter", str(free), str(free)]) == 2
    assert not free.exists()
