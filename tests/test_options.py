"""Options: one definition each, every problem of a request reported together."""

from __future__ import annotations

import pytest

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
