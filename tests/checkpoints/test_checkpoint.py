"""Checkpoint folders: lazily read, damaged ones named, read without being loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from spp.checkpoints.checkpoint import Checkpoint
from spp.checkpoints.hub import resolve_model
from spp.checkpoints.json_files import write_json
from spp.errors import SppError, UsageError
from spp.ops.zeros import canonical_zeros


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


def test_of_a_file_beside_an_index_the_file_counts_as_in_transformers(tmp_path):
    folder = sharded(tmp_path / "model")
    save_file({"a": torch.full((2, 3), 7.0)}, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.names == ["a"] and checkpoint.tensor("a").eq(7).all()


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"c": "model-00001-of-00002.safetensors"}, "00001-of-00002.safetensors holds c, and it does not"),
        ({"b": "model-00001-of-00002.safetensors"}, "00001-of-00002.safetensors holds b, and it does not"),
        ({"a": None}, "00002-of-00002.safetensors holds a, which .* does not list there"),
    ],
)
def test_an_index_and_shards_that_do_not_agree_are_an_error(tmp_path, changes, words):
    folder = sharded(tmp_path / "model")
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, folder / "model-00002-of-00002.safetensors")
    path = folder / "model.safetensors.index.json"
    index = {"a": "model-00002-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"} | changes
    write_json(path, {"weight_map": {name: shard for name, shard in index.items() if shard}})
    with pytest.raises(SppError, match=words):
        Checkpoint.open(folder)


def test_a_tensor_that_two_shards_hold_is_an_error(tmp_path):
    folder = sharded(tmp_path / "model")
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(SppError, match="00002-of-00002.safetensors holds a, which .* does not list there"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", "..\\x.safetensors", "C:x.safetensors"]
    + ["x\0.safetensors", "model.bin", "..", ""],
)
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path, shard):
    """Even where such a file is there, and sound."""
    folder = sharded(tmp_path / "model")
    save_file({"b": torch.zeros(4)}, tmp_path / "secret.safetensors")
    index = {"a": "model-00001-of-00002.safetensors", "b": shard}
    write_json(folder / "model.safetensors.index.json", {"weight_map": index})
    with pytest.raises(SppError, match="shards have to be .safetensors files in the folder itself"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 3}}, "a"])
def test_an_index_of_something_else_is_refused(tmp_path, index):
    folder = sharded(tmp_path / "model")
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(SppError, match="no weight_map"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '"x"', "{", b"\xff"])
@pytest.mark.parametrize("name", ["config.json", "spp.json"])
def test_side_files_of_something_else_are_refused(tmp_path, name, text):
    folder = sharded(tmp_path / "model")
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(SppError, match=f"{name}: (not valid JSON|a JSON object is expected)"):
        _ = checkpoint.config if name == "config.json" else checkpoint.manifest


def entry(first: int, last: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"not json",
        b"[]",
        b'{"a": 1}',
        b"[" * 100_000,
        json.dumps({"a": entry(0, 2**62, [2**60])}).encode(),
        json.dumps({"a": entry(-16, 0, [4])}).encode(),
        json.dumps({"a": entry(8, 24, [4])}).encode(),  # a hole
        json.dumps({"a": entry(0, 16, [4]), "b": entry(0, 16, [4])}).encode(),  # one over the other
        json.dumps({"a": entry(0, 16, [5])}).encode(),
        json.dumps({"a": entry(0, 16, [2**32, 2**32])}).encode(),
        json.dumps({"a": entry(0, 16, [4], "PICKLE")}).encode(),
    ],
    ids=range(12),
)
@pytest.mark.parametrize("length", [None, 0, 2**63, 2**64 - 1])
def test_hostile_headers_are_refused_in_one_sentence(tmp_path, header, length):
    folder = tmp_path / "model"
    folder.mkdir()
    size = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(SppError, match="not a whole safetensors file"):
        Checkpoint.open(folder)


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="it is an adapter: give the model that it is for"):
        Checkpoint.open(tmp_path)


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


@pytest.mark.parametrize("code", [False, True])
def test_code_comes_from_the_hub_only_where_it_is_asked_for(tmp_path, monkeypatch, code):
    from fnmatch import fnmatch

    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda model, allow_patterns: asked.extend(allow_patterns) or str(tmp_path)
    )
    assert resolve_model("someone/model", code=code) == tmp_path
    assert any(fnmatch("modeling_own.py", pattern) for pattern in asked) == code
    assert any(fnmatch("model.safetensors", pattern) for pattern in asked)
    assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in asked)
