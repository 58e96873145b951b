"""Writing a model again: what changes, what must not, and what comes along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from spp.checkpoints.checkpoint import MANIFEST, VERIFICATION, Checkpoint
from spp.checkpoints.json_files import read_json, write_json
from spp.checkpoints.rewrite import Rewriting

UP = "model.layers.0.mlp.up_proj.weight"


def bits(tensor: Tensor) -> list[int]:
    return tensor.flatten().view(torch.uint8).tolist()


@pytest.fixture
def written(tmp_path):
    """Rewrite a folder and return the new one."""

    def call(source: Path, changes=None) -> Path:
        folder = tmp_path / "written"
        folder.mkdir()
        checkpoint = Checkpoint.open(source)
        files = Rewriting(checkpoint, folder)
        for name in checkpoint.names:
            if changes and name in changes:
                files.write(name, changes[name](checkpoint.tensor(name)))
            else:
                files.copy(name)
        files.finish()
        return folder

    return call


@pytest.fixture
def odd(tmp_path) -> Path:
    """A folder with tensors of many dtypes and special values."""
    folder = tmp_path / "odd"
    folder.mkdir()
    special = [1.5, -0.0, 0.0, float("nan"), float("-inf"), 1e-40]
    tensors = {
        "fp32": torch.tensor(special),
        "fp16": torch.tensor(special).half(),
        "bf16": torch.tensor(special).bfloat16(),
        "fp64": torch.tensor(special).double(),
        "nan": torch.tensor([0x7FC01234, -0x3FFFFF]).int().view(torch.float32),
        "int": torch.tensor([-1, 0, 7]),
        "bool": torch.tensor([True, False]),
        "fp8": torch.tensor([1.0, -0.0, 2.0]).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {"model_type": "odd"})
    return folder


def test_copied_tensors_keep_every_bit(odd, written):
    before, after = load_file(odd / "model.safetensors"), load_file(written(odd) / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(after[name]) == bits(tensor), name


def test_written_tensors_keep_every_bit_but_the_sign_of_zero(odd, written):
    names = ("fp32", "fp16", "bf16", "fp64")
    after = load_file(written(odd, {name: lambda tensor: tensor for name in names}) / "model.safetensors")
    before = load_file(odd / "model.safetensors")
    for name in names:
        assert torch.signbit(before[name][1]) and not torch.signbit(after[name][1]), name
        before[name][1] = 0.0
        assert bits(after[name]) == bits(before[name]), name


def test_a_copy_of_a_file_that_ends_too_early_is_an_error(odd, tmp_path):
    checkpoint = Checkpoint.open(odd)
    folder = tmp_path / "copy"
    folder.mkdir()
    files = Rewriting(checkpoint, folder)
    last = max(checkpoint.offsets, key=lambda name: (checkpoint.offsets[name], checkpoint.layouts[name].nbytes))
    with (odd / "model.safetensors").open("r+b") as file:
        file.truncate(checkpoint.offsets[last])
    with pytest.raises(OSError, match=f"ends within {last}"):
        files.copy(last)


def test_changed_tensors_are_what_the_change_says_with_canonical_zeros(tiny_checkpoint, written):
    before = load_file(tiny_checkpoint / "model.safetensors")
    folder = written(tiny_checkpoint, {UP: lambda tensor: tensor * -0.0})
    after = load_file(folder / "model.safetensors")
    assert bits(after.pop(UP)) == [0] * (2 * 48 * 32)
    assert all(bits(after[name]) == bits(before[name]) for name in after)
    assert after.keys() == before.keys() - {UP}


def test_engines_that_look_for_the_format_find_it(tiny_checkpoint, written):
    with safe_open(written(tiny_checkpoint) / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_stay_shards_with_an_index_that_is_right(tiny_model, tmp_path, written):
    source = tmp_path / "shards"
    tiny_model("llama").save_pretrained(source, max_shard_size="20KB")
    folder = written(source, {UP: torch.zeros_like})
    assert {path.name for path in folder.iterdir()} == {path.name for path in source.iterdir()}
    index = read_json(folder / "model.safetensors.index.json")["weight_map"]
    assert len(set(index.values())) > 2
    for name, shard in index.items():
        with safe_open(folder / shard, framework="pt") as file:
            assert name in file.keys()  # noqa: SIM118 (no mapping)
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert not Checkpoint.open(folder).tensor(UP).any()


def test_companions_come_along_and_nothing_else(tiny_checkpoint, written):
    kept = [
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "modeling_own.py",
        "LICENSE",
        "notice.md",
        "x.tiktoken",
    ]
    left = [
        MANIFEST,
        VERIFICATION,
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "training_args.bin",
        "adapter_config.json",
        "README.md",
        "old.gguf",
    ]
    for name in kept + left:
        (tiny_checkpoint / name).write_text(name)
    (tiny_checkpoint / "original.json").mkdir()
    before = {path.name for path in tiny_checkpoint.iterdir()} - set(left) - {"original.json"}
    folder = written(tiny_checkpoint)
    assert {path.name for path in folder.iterdir()} == before
    assert before >= {*kept, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in before - {"model.safetensors"}:
        assert (folder / name).read_bytes() == (tiny_checkpoint / name).read_bytes()


def test_links_of_a_hub_cache_become_files(tiny_checkpoint, tmp_path, written):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in tiny_checkpoint.iterdir():
        (snapshot / path.name).symlink_to(path)
    folder = written(snapshot)
    assert {path.name for path in folder.iterdir()} == {path.name for path in tiny_checkpoint.iterdir()}
    assert not any(path.is_symlink() for path in folder.iterdir())


@pytest.mark.parametrize("announcement", ["sparsity_config", "compression_config"])
def test_an_announced_sparse_format_is_dropped(tiny_checkpoint, written, announcement):
    config = read_json(tiny_checkpoint / "config.json")
    write_json(tiny_checkpoint / "config.json", {**config, announcement: {"format": "sparse-24-bitmask"}})
    assert read_json(written(tiny_checkpoint) / "config.json") == config
