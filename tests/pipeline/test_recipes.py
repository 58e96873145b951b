"""Shipped recipes: each serves `spp run` and `spp train` alike."""

from __future__ import annotations

import pytest

from spp.pipeline.options import RunOptions
from spp.pipeline.recipes import load_recipe, shipped_recipes
from spp.training.options import TrainOptions


@pytest.mark.parametrize("name", shipped_recipes())
def test_training_takes_from_a_recipe_what_a_run_takes(name):
    whole = RunOptions.build(load_recipe(name))
    training = TrainOptions.build({**load_recipe(name, TrainOptions), "model": "model", "out": "out"})
    shared = set(TrainOptions.model_fields) & set(RunOptions.model_fields) - {"model", "out"}
    assert {key: getattr(training, key) for key in shared} == {key: getattr(whole, key) for key in shared}
    assert training.data == whole.train


def test_the_paper_adapts_every_projection_and_learns_prompts_too():
    values = RunOptions.build(load_recipe("paper"))
    assert (str(values.pattern), values.criterion, values.target_modules) == ("2:4", "wanda", "all-linear")
    assert values.join_documents is False and values.completion_only is False and values.max_steps is None
