"""Options: one definition each, every problem of a request reported together."""

from __future__ import annotations

from pathlib import Path

import pytest

from spp.cli.commands import COMMANDS
from spp.errors import UsageError
from spp.patterns import NM, Unstructured
from spp.pipeline.options import RunOptions
from spp.pipeline.recipes import load_recipe, shipped_recipes
from spp.pruning.options import PruneOptions


def test_all_problems_are_reported_at_once_with_the_values_seen():
    with pytest.raises(UsageError) as caught:
        RunOptions.build({"pattern": "5:4", "r": "many", "dropout": 1.0, "colour": "red"})
    message = str(caught.value)
    assert message.startswith("4 problems")
    for part in (
        "'5:4'",
        "r: input should be a valid integer",
        "'many'",
        "dropout",
        "1.0",
        "colour: no such option",
    ):
        assert part in message


def test_what_is_required_is_said():
    with pytest.raises(UsageError, match="model: is required"):
        PruneOptions.build({"out": "x"})


def test_patterns_are_written_one_way():
    assert RunOptions.build({"pattern": " 2 : 4 "}).pattern == NM(2, 4)
    assert RunOptions.build({"pattern": "0.5"}).pattern == Unstructured(0.5)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid(name):
    assert RunOptions.build(load_recipe(name))


def test_paper_recipe_has_the_published_values():
    values = RunOptions.build(load_recipe("paper"))
    published = (16, 2.0, 0.05, 4e-3, 0.001, 0.03, "linear", 128, 3.0, 512, 42)
    assert published == (
        values.r,
        values.scale,
        values.dropout,
        values.learning_rate,
        values.weight_decay,
        values.warmup_ratio,
        values.schedule,
        values.batch_size,
        values.epochs,
        values.window,
        values.seed,
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [("- a list", "expected `option: value`"), ("a: [", "not valid YAML"), ("speed: 9", "speed: no such option")],
)
def test_a_bad_recipe_is_explained(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        load_recipe(str(path))


def test_a_missing_recipe_names_the_shipped_ones():
    with pytest.raises(UsageError, match="demo, paper"):
        load_recipe("nowhere")


FLOATS = [
    (command.options, name)
    for command in COMMANDS.values()
    for name, field in command.options.model_fields.items()
    if field.annotation in (float, float | None)
]


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999", float("inf")])
@pytest.mark.parametrize(("options", "name"), FLOATS)
def test_a_number_is_finite(options, name, value):
    with pytest.raises(UsageError, match=f"{name}: input should be a finite number"):
        options.build({"model": "m", "out": "o", "adapter": "a", "base": "b", "prompt": "p", name: value})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_steps": "9" * 30}, "max_steps"),
        ({"samples": 10**5000}, "samples"),
        ({"out": "~nosuchuser/x"}, "no user 'nosuchuser'"),
        ({"out": "a\udcff"}, "out: .*not UTF-8"),
        ({"model": "a\ud800"}, "model: .*not UTF-8"),
        ({"train": "a\0"}, "train: .*NUL"),
        ({"dtype": ["x" * 100_000]}, "dtype"),
        ({"x" * 100_000: 1}, "no such option"),
        ({"epocs": 1}, "epocs: no such option; did you mean epochs"),
        ({"num_train_epochs": 1}, "it is called epochs here"),
        ({"columns": "question"}, "columns has 'question'; write FIELD=NAME"),
        ({"columns": "answer=output"}, "FIELD is one of"),
        ({"columns": "text=a,text=b"}, "names a field twice"),
    ],
)
def test_nonsense_is_refused_in_a_short_message(values, words):
    with pytest.raises(UsageError, match=words) as caught:
        RunOptions.build(values)
    assert len(str(caught.value)) < 500


def test_home_folders_are_looked_up():
    assert PruneOptions.build({"model": "m", "out": "~/x"}).out == Path.home() / "x"
