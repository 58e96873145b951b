"""What belongs to a model besides its weights reaches every model that is made from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from spp.checkpoints.checkpoint import Checkpoint, is_plain
from spp.checkpoints.companions import companions
from spp.checkpoints.options import PackOptions, UnpackOptions
from spp.checkpoints.pack import unpack
from spp.checkpoints.rewrite import write_companions
from spp.pruning.options import PruneOptions
from spp.pruning.pack import pack
from spp.pruning.prune import prune

OWN = ("additional_chat_templates/tool_use.jinja", "tokenizer.model.v3", "vocab.bpe", "NOTICE.md", "preprocessor.yaml")
OTHERS = ("README.md", ".gitattributes", "checkpoint-10/optimizer.pt", "checkpoint-10/trainer_state.json", "old.bin",
          "pytorch_model.bin.index.json", "onnx/model.onnx", "onnx/config.json")  # fmt: skip


@pytest.fixture
def crowded(tiny_checkpoint: Path) -> Path:
    """A model folder with all kinds of files in it."""
    for name in (*OWN, *OTHERS):
        path = tiny_checkpoint / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    return tiny_checkpoint


def test_everything_that_is_not_weights_belongs_to_a_model(crowded):
    found = set(map(str, companions(crowded)))
    assert found >= {*OWN, "config.json", "tokenizer.json"} and not found & set(OTHERS)
    assert not any(name.endswith(".safetensors") for name in found)


def test_it_reaches_every_model_that_is_made(crowded, tmp_path):
    values = {"model": str(crowded), "out": tmp_path / "pruned", "criterion": "magnitude"}
    folders = [prune(PruneOptions.build(values)).out, tmp_path / "packed", tmp_path / "plain"]
    pack(PackOptions(model=str(folders[0]), out=folders[1]))
    unpack(UnpackOptions(model=str(folders[1]), out=folders[2]))
    for folder in folders:
        assert all((folder / name).read_text() == name for name in OWN)
        assert not any((folder / name).exists() for name in OTHERS if name != "README.md")


SPARSE_ONLY = {
    "quant_method": "compressed-tensors",
    "sparsity_config": {"format": "dense", "sparsity_structure": "2:4"},
}


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (None, True),
        ({}, True),
        (SPARSE_ONLY, True),
        ({"quant_method": "compressed-tensors"}, True),
        ({**SPARSE_ONLY, "sparsity_config": {"format": "sparse-24-bitmask"}}, False),
        ({**SPARSE_ONLY, "config_groups": {"group_0": {}}}, False),
        ({"sparsity_config": {"format": "dense"}}, True),
        ({"sparsity_config": {"format": "dense"}, "quant_method": "gptq"}, False),
        ({"bits": 4}, False),
        ({"quant_method": "gptq"}, False),
        ("odd", False),
    ],
)
def test_a_model_is_plain_where_nothing_is_quantized(config, plain):
    assert is_plain(config) == plain


def test_what_announces_nothing_is_left_out_of_a_new_model(crowded, tmp_path):
    import json

    config = json.loads((crowded / "config.json").read_text())
    (crowded / "config.json").write_text(json.dumps({**config, "quantization_config": SPARSE_ONLY}))
    (tmp_path / "new").mkdir()
    write_companions(Checkpoint.open(crowded), tmp_path / "new")
    assert "quantization_config" not in json.loads((tmp_path / "new" / "config.json").read_text())
