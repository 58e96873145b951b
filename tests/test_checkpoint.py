"""Checkpoint folders: lazily read, damaged ones named, read without being loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from spp.checkpoint import Checkpoint, resolve_model
from spp.errors import SppError, UsageError
from spp.folders import read_json, write_json
from spp.values import canonical_zeros


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_canonical_zeros_changes_the_bits_of_negative_zeros_alone(dtype):
    info = torch.finfo(dtype)
    special = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), info.smallest_normal / 2, -info.tiny / 4, -1.5]
    tensor = torch.tensor(special, dtype=dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    expected = tensor.clone().view(bits)
    expected[1] = 0
    assert torch.equal(canonical_zeros(tensor).view(bits), expected)


@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=64))
def test_canonical_zeros_keeps_every_other_bf16_bit_pattern(patterns):
    bits = torch.tensor(patterns, dtype=torch.int16)
    result = canonical_zeros(bits.view(torch.bfloat16)).view(torch.int16)
    assert torch.equal(result, torch.where(bits == -(2**15), 0, bits))


def test_integers_pass_unchanged():
    counts = torch.tensor([0, 3, -1])
    assert canonical_zeros(counts) is counts


def sharded(folder: Path) -> Path:
    folder.mkdir()
    save_file({"a": torch.ones(2, 3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(4)}, folder / "model-00002-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"weight_map": names})
    write_json(folder / "config.json", {"model_type": "llama"})
    return folder


def test_sharded_checkpoint_is_read_lazily_and_completely(tmp_path):
    checkpoint = Checkpoint.open(sharded(tmp_path / "model"))
    assert checkpoint.names == ["a", "b"]
    assert checkpoint.shape("a") == (2, 3)
    assert {name: tensor.tolist() for name, tensor in checkpoint.items()} == {"a": [[1.0] * 3] * 2, "b": [0.0] * 4}
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.manifest == {}


def test_a_missing_shard_is_named(tmp_path):
    folder = sharded(tmp_path / "model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SppError, match=r"model-00002-of-00002\.safetensors.*not there"):
        Checkpoint.open(folder)


def test_a_truncated_shard_is_named(tmp_path):
    folder = sharded(tmp_path / "model")
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(SppError, match=r"model-00001-of-00002\.safetensors.*truncated"):
        Checkpoint.open(folder)


def test_an_index_that_promises_too_much_is_an_error(tmp_path):
    folder = sharded(tmp_path / "model")
    index = read_json(folder / "model.safetensors.index.json")
    index["weight_map"]["c"] = "model-00001-of-00002.safetensors"
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(SppError, match="lists 1 tensors that no shard holds, e.g. c"):
        Checkpoint.open(folder)


def test_pickled_weights_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="convert them"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("model", ["./missing", "/missing/model", "a/b/c"])
def test_a_missing_folder_is_a_usage_error(model):
    with pytest.raises(UsageError, match="no such folder"):
        resolve_model(model)


def test_a_file_is_no_model(tmp_path):
    file = tmp_path / "weights"
    file.touch()
    with pytest.raises(UsageError, match="is a file"):
        resolve_model(str(file))
