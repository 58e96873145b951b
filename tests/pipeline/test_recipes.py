"""Shipped recipes: each serves `spp run` and `spp train` alike."""

from __future__ import annotations

import os

import pytest

from spp.errors import UsageError
from spp.pipeline.options import RunOptions
from spp.pipeline.recipes import load_recipe, shipped_recipes
from spp.training.options import TrainOptions


@pytest.mark.parametrize("name", shipped_recipes())
def test_training_takes_from_a_recipe_what_a_run_takes(name):
    whole = RunOptions.build({**load_recipe(name), "effort": "quick"})  # only a run knows a dense model to learn from
    training = TrainOptions.build({**load_recipe(name, TrainOptions), "model": "model", "out": "out"})
    shared = set(TrainOptions.model_fields) & set(RunOptions.model_fields) - {"model", "out"}
    assert {key: getattr(training, key) for key in shared} == {key: getattr(whole, key) for key in shared}
    assert training.data == whole.train


def test_the_demo_makes_an_effort_that_a_word_takes_back():
    demo = load_recipe("demo")
    values = RunOptions.build(demo)
    assert (values.effort, values.criterion, values.reconstruct) == ("standard", "admm", "block") and values.teacher
    quick = RunOptions.build({**demo, "effort": "quick"})
    assert (quick.criterion, quick.reconstruct, quick.teacher) == ("wanda", None, None)


def test_the_paper_adapts_every_projection_and_learns_prompts_too():
    values = RunOptions.build(load_recipe("paper"))
    assert (str(values.pattern), values.criterion, values.target_modules) == ("2:4", "wanda", "all-linear")
    assert values.join_documents is False and values.completion_only is False and values.max_steps is None


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nseed: 2", "line 2: 'seed' is there twice, first in line 1"),
        ("max-steps: 1\nmax_steps: 2", "line 2: 'max_steps' is there twice, first in line 1"),
        ("pattern: 2:4", "line 1: YAML reads '2:4' as the number 124; quote it: \"2:4\""),
        ("learning_rate: 1:30.5", "as the number 90.5; quote it"),
        ("seed: " + "9" * 6000, "a number of more digits"),
        ("out: " + "[" * 5000, "nested too deeply"),
        ("x: !!timestamp 2024-13-45", "month must be in 1..12"),
        ("a: 1\n---\nb: 2", "line 2"),
        (BOMB, "no such option"),
        ("model: &a [*a]", "no such option|model: input should be a valid string"),
        (BOMB.replace("i: ", "model: "), "no such option"),
        ("epochs: .inf", "finite"),
        ("epochs: .nan", "finite"),
        ("out: ~nosuchuser/x", "no user 'nosuchuser'"),
        ("num-train-epochs: 3", "num_train_epochs: no such option; it is called epochs here"),
        ("epocs: 3", "did you mean epochs"),
        ("? [a]\n: 1", "line 1: found unhashable key"),
        ("model: \0", "not valid YAML"),
    ],
)
def test_what_yaml_would_change_or_choke_on_is_one_short_error(tmp_path, text, words):
    (path := tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        RunOptions.build(load_recipe(str(path)))
    assert len(str(caught.value)) < 3000 and "\n  in " not in str(caught.value)


def test_a_date_is_the_name_of_a_folder(tmp_path):
    (path := tmp_path / "recipe.yaml").write_text("out: 2024-13-45\nmodel: 2024-01-01")
    values = RunOptions.build(load_recipe(str(path)))
    assert (str(values.out), values.model) == ("2024-13-45", "2024-01-01")


def test_a_recipe_that_is_no_file_or_no_text_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff")
    for name, words in (("pipe.yaml", "pipe"), (".", "is a folder"), ("latin.yaml", "not valid YAML")):
        with pytest.raises(UsageError, match=words):
            load_recipe(str(tmp_path / name))
    with pytest.raises(UsageError, match="no user 'nosuchuser'"):
        load_recipe("~nosuchuser/recipe.yaml")


def test_a_recipes_learning_rate_is_for_its_own_method(tmp_path):
    assert "learning_rate" not in load_recipe("paper", method="full")
    assert load_recipe("paper", method="spp")["learning_rate"] == load_recipe("paper")["learning_rate"] == 4e-3
    path = tmp_path / "full.yaml"
    path.write_text("method: full\nlearning_rate: 1.0e-3\n")
    assert load_recipe(str(path), method="full")["learning_rate"] == 1e-3
    assert "learning_rate" not in load_recipe(str(path), method="spp")
