"""Inspection of hand-made checkpoints: known patterns, known counts, both orientations, sharded files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from spp.checkpoints.inspect import inspect_model, inspection_table
from spp.checkpoints.options import InspectOptions
from spp.errors import SppError, UsageError


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], model_type: str = "llama") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def inspect(folder: Path):
    return inspect_model(InspectOptions(model=str(folder)))


def shown(report) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(inspection_table(report))
    return capture.get()


TWO_OF_FOUR = torch.tensor([[1.0, 0, 0, 2], [0, 3, 4, 0]]).repeat(1, 2)  # (2, 8), 8 zeros
ONE_OF_FOUR = torch.tensor([[1.0, 0, 0, 0], [0, 0, 4, 0]])  # (2, 4), 6 zeros
UNEVEN = torch.tensor([[0.0, 0, 0, 0], [1, 2, 3, 4]])  # (2, 4), 4 zeros, no N:M
DENSE = torch.ones(3, 5)


def test_patterns_and_totals_by_hand(tmp_path):
    report = inspect(
        checkpoint(
            tmp_path / "m",
            {
                "a.weight": TWO_OF_FOUR.bfloat16(),
                "b.weight": ONE_OF_FOUR,
                "c.weight": UNEVEN.half(),
                "d.weight": DENSE,
                "norm.weight": torch.tensor([1.0, 0.0, 1.0]),
            },
        )
    )
    found = {name: (facts.shape, facts.dtype, facts.zeros, facts.pattern) for name, facts in report.matrices.items()}
    assert found == {
        "a.weight": ((2, 8), "bfloat16", 8, "2:4"),
        "b.weight": ((2, 4), "float32", 6, "1:4"),
        "c.weight": ((2, 4), "float16", 4, "50%"),
        "d.weight": ((3, 5), "float32", 0, None),
    }
    assert report.matrices["b.weight"].sparsity == 0.75
    assert (report.parameters, report.non_zeros) == (16 + 8 + 8 + 15 + 3, 50 - 19)
    assert report.sparsity == 19 / 50
    assert (report.pruned, report.pruned_sparsity) == (3, 18 / 32)
    assert (report.others.tensors, report.others.parameters, report.others.zeros) == (1, 3, 1)
    assert report.warnings == []


def test_a_conv1d_is_looked_at_as_out_by_in(tmp_path):
    stored = TWO_OF_FOUR.T  # (I, O), as GPT-2 has it: along its rows it obeys no pattern
    tensors = {"h.0.attn.c_attn.weight": stored, "h.0.attn.other.weight": stored}
    report = inspect(checkpoint(tmp_path / "m", tensors, "gpt2"))
    conv, linear = report.matrices.values()
    assert (conv.shape, conv.transposed, conv.pattern) == ((2, 8), True, "2:4")
    assert (linear.shape, linear.transposed, linear.pattern) == ((8, 2), False, "50%")


def test_stacked_experts_are_matrices(tmp_path):
    stack = torch.stack([TWO_OF_FOUR, TWO_OF_FOUR.flip(0)])
    report = inspect(checkpoint(tmp_path / "m", {"experts.down_proj": stack}))
    facts = report.matrices["experts.down_proj"]
    assert (facts.shape, facts.zeros, facts.pattern) == ((2, 2, 8), 16, "2:4")
    assert "2 x 2 x 8" in shown(report)


def test_negative_zeros_and_damage_are_counted_and_warned_of(tmp_path):
    weight = TWO_OF_FOUR.clone()
    weight[0, 1] = -0.0
    weight[0, 0], weight[1, 1] = float("nan"), float("inf")
    norm = torch.tensor([-0.0, 1.0])
    report = inspect(checkpoint(tmp_path / "m", {"a.weight": weight.bfloat16(), "norm.weight": norm}))
    facts = report.matrices["a.weight"]
    assert (facts.zeros, facts.negative_zeros, facts.non_finite, facts.pattern) == (8, 1, 2, "2:4")
    assert report.others.negative_zeros == 1
    assert [warning[:18] for warning in report.warnings] == ["2 zeros are -0.0, ", "2 entries are NaN "]
    text = shown(report)
    assert "-0.0" in text and "NaN/inf" in text and "warning: 2 zeros are -0.0" in text


def test_integers_are_named_and_not_counted(tmp_path):
    tensors = {"a.qweight": torch.zeros(4, 4, dtype=torch.int8), "b.weight": DENSE}
    report = inspect(checkpoint(tmp_path / "m", tensors))
    assert list(report.matrices) == ["b.weight"]
    assert (report.parameters, report.others.not_float) == (15, 1)
    assert "not looked into" in report.warnings[0]


def test_shards_are_read_as_one_model(tmp_path):
    folder = checkpoint(tmp_path / "m", {"a.weight": TWO_OF_FOUR, "b.weight": DENSE})
    whole = inspect(folder)
    (folder / "model.safetensors").unlink()
    shards = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    save_file({"a.weight": TWO_OF_FOUR}, folder / shards["a.weight"])
    save_file({"b.weight": DENSE}, folder / shards["b.weight"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert inspect(folder) == whole
    (folder / shards["b.weight"]).unlink()
    with pytest.raises(SppError, match="00002"):
        inspect(folder)


def test_a_model_of_transformers(tmp_path, tiny_model):
    tiny_model("gpt2").save_pretrained(tmp_path / "m")
    report = inspect(tmp_path / "m")
    assert report.parameters == sum(parameter.numel() for parameter in tiny_model("gpt2").parameters())
    assert report.matrices["transformer.h.0.attn.c_attn.weight"].shape == (96, 32)
    assert report.pruned_sparsity is None
    assert "no matrix is pruned" in shown(report)


def test_the_report_is_json_and_the_table_shows_names_as_they_are(tmp_path):
    report = inspect(checkpoint(tmp_path / "m", {"[red]a[/red].weight": TWO_OF_FOUR, "norm.weight": torch.ones(3)}))
    assert json.loads(json.dumps(asdict(report)))["matrices"]["[red]a[/red].weight"]["shape"] == [2, 8]
    text = shown(report)
    assert "[red]a[/red].weight" in text and "2:4" in text and "50.00%" in text and "1 other tensors" in text
    assert "NaN/inf" not in text and "-0.0" not in text


def test_an_empty_tensor_is_dense(tmp_path):
    report = inspect(checkpoint(tmp_path / "m", {"a.weight": torch.zeros(0, 4)}))
    assert report.matrices["a.weight"].pattern is None and report.sparsity == 0


def test_a_missing_model(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        inspect(tmp_path / "nowhere")


def test_a_model_type_that_is_a_list_is_of_no_family(tiny_checkpoint):
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    (tiny_checkpoint / "config.json").write_text(json.dumps({**config, "model_type": ["gpt2"]}))
    assert inspect_model(InspectOptions(model=str(tiny_checkpoint)))
