"""A teacher cache that is truncated or damaged is one error, before and while it is trained with."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from spp.cli.entry_point import main
from spp.data.examples import Example
from spp.errors import SppError
from spp.training.teacher import CACHE_FILE, CachedTeacher, cache_manifest

EXAMPLES = [Example([1, 2, 3], [1, 2, 3]), Example([4, 5], [4, 5])]


def cache(folder, **changes):
    tensors = {"tokens.0": torch.zeros(3, 2, dtype=torch.int32), "log_probabilities.0": torch.full((3, 2), -1.0).half()}
    save_file({**tensors, **changes}, folder / CACHE_FILE)


def ask(folder):
    teacher = CachedTeacher(folder, 1.0, EXAMPLES, vocabulary=8)
    teacher.teacher_batch({"labels": torch.zeros(2, 3, dtype=torch.int64)}, [0, 1])


def test_a_whole_one_answers(tmp_path):
    cache(tmp_path)
    ask(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens.0": torch.zeros(2, 2, dtype=torch.int32)},
        {"log_probabilities.0": torch.zeros(3, 1).half()},
        {"tokens.0": torch.zeros(3, dtype=torch.int32), "log_probabilities.0": torch.zeros(3).half()},
        {"tokens.0": torch.full((3, 2), 8, dtype=torch.int32)},
        {"tokens.0": torch.full((3, 2), -1, dtype=torch.int32)},
        {"tokens.0": torch.zeros(3, 2)},
        {"log_probabilities.0": torch.full((3, 2), float("nan")).half()},
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes):
    cache(tmp_path, **changes)
    with pytest.raises(SppError, match="teacher.safetensors: not .*ask the teacher again"):
        ask(tmp_path)


def test_a_truncated_one_is_refused(tmp_path):
    cache(tmp_path)
    whole = (tmp_path / CACHE_FILE).read_bytes()
    for length in (0, 7, 60, len(whole) - 1):
        (tmp_path / CACHE_FILE).write_bytes(whole[:length])
        with pytest.raises(SppError, match="teacher.safetensors: not a whole teacher cache"):
            ask(tmp_path)


@pytest.mark.parametrize("changes", [{"vocabulary": "x"}, {"temperature": None}, {"temperature": 0}, {"examples": 5}])
def test_a_damaged_manifest_is_refused(tmp_path, changes):
    manifest = {"kind": "teacher-cache", "vocabulary": 8, "temperature": 1.0, "examples": "abc", **changes}
    (tmp_path / "spp.json").write_text(json.dumps(manifest))
    with pytest.raises(SppError, match="not the manifest of a teacher cache"):
        cache_manifest(tmp_path)


def test_training_with_a_truncated_cache_is_one_message(tmp_path, tiny_checkpoint, stories, capsys):
    made, data = tmp_path / "made", ["--data", str(stories), "--window", "32"]
    assert main(["cache-teacher", str(tiny_checkpoint), str(made), *data]) == 0
    whole = (made / CACHE_FILE).read_bytes()
    (made / CACHE_FILE).write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert main(["train", str(tiny_checkpoint), str(tmp_path / "out"), *data, "--teacher", str(made)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "teacher.safetensors" in errors[0]
