"""Verification between two folders: it passes only when every zero is a +0.0, and names what breaks it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spp.checkpoints.options import VerifyOptions
from spp.checkpoints.verify import verify
from spp.errors import UsageError
from spp.patterns import NM

WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path, tiny_model) -> Path:
    model = tiny_model("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.masked_fill_(~NM(2, 4).keep_mask(parameter.float().abs()), 0.0)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edited(base: Path, edit) -> Path:
    """A copy of a model folder with its tensors changed by `edit(tensors)`."""
    folder = base.parent / "other"
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def check(base: Path, other: Path, pattern: str | None = None):
    return verify(VerifyOptions(base=str(base), other=str(other), pattern=pattern))


def set_first_zero(value: float):
    def edit(tensors):
        row, column = (tensors[WEIGHT] == 0).nonzero()[0].tolist()
        tensors[WEIGHT][row, column] = value

    return edit


def test_new_survivors_values_do_not_matter(base):
    def edit(tensors):
        tensors[WEIGHT] *= 2  # exact in every dtype

    report = check(base, edited(base, edit), "2:4")
    assert report.verified and report.problems == []
    assert report.zeros == sum(int((t == 0).sum()) for t in load_file(base / "model.safetensors").values())
    assert report.tensors[WEIGHT].largest_relative_change == 1.0


@pytest.mark.parametrize(("value", "words"), [(1e-8, ""), (-0.0, r" \(1 of them -0\.0\)")])
def test_one_changed_zero_is_found_and_named(base, value, words):
    report = check(base, edited(base, set_first_zero(value)))
    assert not report.verified
    [problem] = report.problems
    zeros = report.tensors[WEIGHT].zeros
    assert problem.startswith(f"{WEIGHT}: 1 of {zeros} zeros of BASE are not +0.0 in OTHER")
    assert problem.endswith("(1 of them -0.0)") == bool(words)


def test_negative_zeros_in_the_base_count_as_zeros(base):
    other = edited(base, lambda tensors: None)
    tensors = load_file(base / "model.safetensors")
    set_first_zero(-0.0)(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert check(base, other).verified
    assert not check(other, base).verified


def test_numbers_without_dimensions_are_compared_like_any_other(tmp_path):
    for name, zero, scale in (("base", -0.0, 0.0), ("same", -0.0, 0.0), ("other", -0.0, 1.0)):
        (tmp_path / name).mkdir()
        save_file({"zero": torch.tensor(zero), "scale": torch.tensor(scale)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    assert check(tmp_path / "base", tmp_path / "same").verified
    assert check(tmp_path / "base", tmp_path / "other").problems == [
        "scale: 1 of 1 zeros of BASE are not +0.0 in OTHER"
    ]


def test_missing_and_misshapen_tensors_are_named(base):
    def edit(tensors):
        del tensors[WEIGHT]
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()

    report = check(base, edited(base, edit))
    assert [problem.split(":")[0] for problem in report.problems] == [WEIGHT, "model.norm.weight"]


def test_new_nan_is_a_problem(base):
    def edit(tensors):
        tensors["model.norm.weight"][3] = float("nan")

    report = check(base, edited(base, edit))
    assert report.problems == ["model.norm.weight: 1 entries turned NaN or infinite"]


def test_the_pattern_is_checked_in_the_other_model(base):
    assert check(base, base, "2:4").verified
    broken = check(base, base, "1:4")
    assert len(broken.problems) == 14
    assert "groups break the pattern 1:4" in broken.problems[0]


def test_a_dense_base_has_no_pattern(tmp_path, tiny_model):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    report = check(tmp_path / "dense", tmp_path / "dense", "2:4")
    assert not report.verified
    assert "no weight of BASE is sparse enough" in report.problems[0]


def test_unrelated_models_are_a_usage_error(base, tmp_path, tiny_model):
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UsageError, match="no tensor name in common"):
        check(base, tmp_path / "gpt2")
