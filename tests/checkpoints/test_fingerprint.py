"""Fingerprints tell models apart, and do not mind how a checkpoint is stored."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from spp.checkpoints.fingerprint import base_fingerprint
from spp.checkpoints.json_files import read_json, write_json
from spp.errors import SppError, UsageError
from spp.pruning.options import PruneOptions
from spp.pruning.prune import prune

WEIGHTS = "model.safetensors"


@pytest.fixture
def altered(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint with changed tensors and the fingerprint of it."""

    def make(change) -> str:
        folder = tmp_path / "altered"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_checkpoint, folder)
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return base_fingerprint(folder)

    return make


def test_it_is_the_same_for_the_same_model_however_it_is_stored(tiny_checkpoint, tmp_path, altered):
    fingerprint = base_fingerprint(tiny_checkpoint)
    assert len(fingerprint) == 64
    assert fingerprint == base_fingerprint(tiny_checkpoint) == altered(lambda tensors: None)

    shards = tmp_path / "shards"
    shards.mkdir()
    shutil.copy(tiny_checkpoint / "config.json", shards)
    tensors = load_file(tiny_checkpoint / WEIGHTS)
    weight_map = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, shards / shard)
    write_json(shards / f"{WEIGHTS}.index.json", {"weight_map": weight_map})
    assert base_fingerprint(shards) == fingerprint


def test_companions_do_not_count(tiny_checkpoint):
    fingerprint = base_fingerprint(tiny_checkpoint)
    (tiny_checkpoint / "README.md").touch()
    (tiny_checkpoint / "tokenizer.json").unlink()
    config = read_json(tiny_checkpoint / "config.json")
    write_json(tiny_checkpoint / "config.json", {**config, "transformers_version": "9.9", "use_cache": False})
    assert base_fingerprint(tiny_checkpoint) == fingerprint


def nudge(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][0, 7] += 1


def rename(tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")


def reshape(tensors):
    tensors["model.norm.weight"] = torch.cat([tensors["model.norm.weight"]] * 2)


def widen(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()


def reinterpret(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(torch.float16)


def swap(tensors):
    first, second = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()


@pytest.mark.parametrize("change", [nudge, rename, reshape, widen, reinterpret, swap])
def test_it_differs_for_other_weights(tiny_checkpoint, altered, change):
    assert altered(change) != base_fingerprint(tiny_checkpoint)


def test_it_differs_for_another_architecture_with_the_same_tensors(tiny_checkpoint, tmp_path):
    fingerprint = base_fingerprint(tiny_checkpoint)
    config = read_json(tiny_checkpoint / "config.json")
    write_json(tiny_checkpoint / "config.json", {**config, "model_type": "mistral"})
    assert base_fingerprint(tiny_checkpoint) != fingerprint


def test_it_differs_for_every_way_of_pruning(tiny_checkpoint, stories, tmp_path):
    ways = [("2:4", "magnitude", 0), ("50%", "magnitude", 0), ("2:4", "wanda", 0), ("2:4", "wanda", 1)]
    seen = {base_fingerprint(tiny_checkpoint)}
    for number, (pattern, criterion, seed) in enumerate(ways):
        values = {"pattern": pattern, "criterion": criterion, "seed": seed, "calibration": str(stories)}
        values |= {"model": str(tiny_checkpoint), "out": tmp_path / str(number), "samples": 2, "window": 16}
        prune(PruneOptions.build(values))
        seen.add(base_fingerprint(tmp_path / str(number)))
    assert len(seen) == 1 + len(ways)


def test_scalars_empty_tensors_and_integers_are_covered(tmp_path):
    def fingerprint(**tensors):
        write_json(tmp_path / "config.json", {"model_type": "x"})
        save_file(tensors, tmp_path / WEIGHTS)
        return base_fingerprint(tmp_path)

    scalar, other, empty = torch.tensor(1.0), torch.tensor(2.0), torch.empty(0, 3)
    count = torch.tensor([3])
    seen = {
        fingerprint(a=scalar, b=empty, c=count),
        fingerprint(a=other, b=empty, c=count),
        fingerprint(a=scalar, b=empty.T.contiguous(), c=count),
        fingerprint(a=scalar, b=empty, c=count + 1),
        fingerprint(a=scalar, b=empty, c=count.int()),
    }
    assert len(seen) == 5


def test_damaged_folders_are_errors(tiny_checkpoint, tmp_path):
    with pytest.raises(UsageError, match=r"neither model\.safetensors"):
        base_fingerprint(tmp_path)
    path = tiny_checkpoint / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SppError, match="truncated"):
        base_fingerprint(tiny_checkpoint)
