"""`--effort`: values for what was not given, and nothing else."""

from __future__ import annotations

import logging
import shlex
from typing import get_args

import pytest

from spp.cli.entry_point import main
from spp.errors import UsageError
from spp.pipeline.bundled import bundled_model
from spp.pipeline.efforts import EFFORTS
from spp.pipeline.options import RunOptions
from spp.pipeline.recipes import load_recipe
from spp.pipeline.run import run
from spp.pruning.options import Criterion, Refinement, Update
from spp.pruning.steps import steps_of

MORE = sorted(EFFORTS)


def test_without_a_word_nothing_is_added():
    values = RunOptions.build({"model": "m"})
    assert dict(values) == {name: field.default for name, field in RunOptions.model_fields.items()} | {"model": "m"}


@pytest.mark.parametrize("effort", MORE)
def test_an_effort_adds_mask_reconstruction_and_the_dense_model_as_teacher(effort):
    values = RunOptions.build({"model": "m", "effort": effort})
    assert values.criterion != "wanda" and values.reconstruct == "block" and values.teacher == "m"
    assert RunOptions.build({"effort": effort}).teacher == str(bundled_model())
    assert values.learning_rate == ("auto" if effort == "best" else None)


@pytest.mark.parametrize("effort", MORE)
def test_what_is_given_wins_in_a_recipe_and_on_the_command_line(effort, tmp_path):
    (path := tmp_path / "recipe.yaml").write_text(f"effort: {effort}\ncriterion: ria\nsamples: 3\nmodel: m\n")
    values = RunOptions.build({**load_recipe(str(path)), "samples": "5", "teacher": "other", "epochs": 1})
    assert (values.criterion, values.samples, values.teacher, values.epochs) == ("ria", 5, "other", 1)
    assert values.reconstruct == "block"


@pytest.mark.parametrize("effort", MORE)
@pytest.mark.parametrize(
    ("option", "kinds"), [("criterion", Criterion), ("refine", Refinement), ("update", Update), ("method", str)]
)
def test_one_step_of_ones_own_goes_with_the_steps_of_an_effort(effort, option, kinds):
    for value in get_args(kinds) or ("full", "spp"):
        if value in ("dsnot", "admm") and option in ("refine", "update"):
            continue  # refused beside ADMM whoever asks for both, with a message that names the two
        steps_of(RunOptions.build({"effort": effort, option: value}))


@pytest.mark.parametrize("effort", MORE)
def test_a_sparse_model_is_no_teacher(effort):
    with pytest.raises(UsageError, match=f"effort {effort} learns from a dense model, and keep-zeros has none"):
        RunOptions.build({"effort": effort, "keep_zeros": True})


def test_what_is_no_effort_is_refused():
    for value in ("most", ["best"], {}):
        with pytest.raises(UsageError, match="effort: input should be 'quick', 'standard' or 'best'"):
            RunOptions.build({"effort": value})


def test_a_run_says_what_was_used_and_its_command_resumes_it(tmp_path, tiny_checkpoint, stories, caplog):
    data = {"model": str(tiny_checkpoint), "train": str(stories), "eval": str(stories), "out": tmp_path / "run"}
    few = {"samples": 4, "window": 32, "max_steps": 2, "batch_size": 8, "reconstruct_epochs": 3}
    with caplog.at_level(logging.INFO, "spp"):
        report = run(RunOptions.build({**data, **few, "effort": "standard", "refine": "swaps"}))
    results = report.plain()
    assert results["verified"] and list(results["perplexity"]) == ["dense", "pruned", "reconstructed", "spp"]
    assert results["protocol"]["criterion_title"] == "ADMM, swaps"
    used = results["options"]
    assert [used[name] for name in ("effort", "criterion", "refine", "reconstruct", "teacher")] == [
        "standard", "admm", "swaps", "block", str(tiny_checkpoint)
    ]  # fmt: skip
    assert "on 12 full windows, as many as 2 steps of fine-tuning" in caplog.text and "asks the teacher" in caplog.text

    words = shlex.split(results["command"])
    assert "--effort" in words and "--refine" in words and "--criterion" not in words and "--teacher" not in words
    assert main(words[1:]) == 0
    assert run(RunOptions.build({**data, **few, **used})).plain()["seconds"] == results["seconds"]  # nothing ran again

    with pytest.raises(UsageError, match="criterion was admm and is wanda now; reconstruct was block and is None now"):
        run(RunOptions.build({**data, **few, "refine": "swaps"}))
