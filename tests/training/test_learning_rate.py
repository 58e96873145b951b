"""The learning rate: by the model's size, or the best of a search that leaves no trace. Training that only harms."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_model_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig

from spp.errors import SppError, UsageError
from spp.pruning.options import PruneOptions
from spp.pruning.prune import prune
from spp.training import progress_callback, rate_search, trainer
from spp.training.learning_rate import scaled_rate
from spp.training.options import TrainingSettings, TrainOptions
from spp.training.rate_search import search
from spp.training.train import train


@pytest.fixture
def options(tmp_path: Path, tiny_checkpoint: Path, stories: Path):
    pruned = tmp_path / "pruned"
    prune(PruneOptions.build({"model": str(tiny_checkpoint), "out": pruned, "criterion": "magnitude"}))

    def make(out: str = "adapter", **changes) -> TrainOptions:
        values = {"model": str(pruned), "out": tmp_path / out, "data": str(stories), "window": 48, "device": "cpu"}
        return TrainOptions.build({**values, "learning_rate": "auto", "max_steps": 12, "r": 4, **changes})

    return make


def settings(**values) -> TrainingSettings:
    return TrainingSettings.build(values)


def test_rates_by_hand() -> None:
    config = LlamaConfig(hidden_size=256, num_hidden_layers=36)  # the square root of their product is 96
    assert scaled_rate(settings(), config) == pytest.approx(1 / 192)
    assert scaled_rate(settings(scale=1.0), config) == pytest.approx(1 / 96)
    assert scaled_rate(settings(init_weights="published"), config) == 0.004
    wider = LlamaConfig(hidden_size=1024, num_hidden_layers=36)
    for method in ("spp", "full"):
        one = settings(method=method)
        assert scaled_rate(one, wider) == pytest.approx(scaled_rate(one, config) / 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_rate(family: str) -> None:
    assert (
        0.01 < scaled_rate(settings(), tiny_model_of(family).config) < 0.1
    )  # they are all about 32 wide, with 2 blocks or more


@given(best=st.integers(-3, 3), steepness=st.floats(0.1, 10))
def test_the_search_finds_the_valley(best: int, steepness: float) -> None:
    losses = {2.0**power: steepness * abs(power - best) for power in range(-9, 10)}
    tried = search(losses.__getitem__, 1.0)
    assert min(tried, key=tried.__getitem__) == 2.0**best
    assert len(tried) <= 6 and tried == {rate: losses[rate] for rate in tried}


@given(losses=st.lists(st.floats(0, 10) | st.just(math.inf), min_size=13, max_size=13))
def test_the_search_ends(losses: list[float]) -> None:
    tried = search(lambda rate: losses[6 + round(math.log2(rate))], 1.0)
    assert 1.0 in tried and len(tried) <= 6
    reached = sorted(round(math.log2(rate)) for rate in tried)
    assert reached == list(range(reached[0], reached[-1] + 1))


def test_a_search_leaves_no_trace_in_the_run(options, caplog, tmp_path) -> None:
    with caplog.at_level(logging.INFO, "spp"):
        found = train(options("auto", dropout=0.1))
    losses = dict(found.rates_tried)
    assert len(losses) >= 3 and losses[found.learning_rate] == min(losses.values())
    assert found.examples == 200 - 32 and len(found.validation) == 2
    assert caplog.text.count("on held-out examples after 10 steps") == len(losses)
    told = train(options("told", learning_rate=found.learning_rate, validation=32, dropout=0.1))
    assert (told.losses, told.validation) == (found.losses, found.validation)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("auto", "told"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert told.rates_tried == []


def test_a_killed_run_does_not_search_again(options, monkeypatch) -> None:
    real = progress_callback.TrainingProgress.on_log

    def on_log(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        if state.max_steps == 12 and state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress_callback.TrainingProgress, "on_log", on_log)
        with pytest.raises(KeyboardInterrupt):
            train(options(save_steps=3))
    with monkeypatch.context() as patch:
        patch.setattr(rate_search, "search", lambda *_: pytest.fail("this was done before"))
        again = train(options(save_steps=3))
    whole = train(options("whole", save_steps=3))
    assert (again.losses, again.rates_tried, again.validation) == (whole.losses, whole.rates_tried, whole.validation)


def test_rates_that_diverge_are_left(options, monkeypatch) -> None:
    monkeypatch.setattr(trainer.SppTrainer, "_validation_loss", lambda self: math.nan)
    with pytest.raises(SppError, match="learning-rate auto: training diverges at all rates from"):
        train(options())


def test_a_sharded_model_is_not_searched(options) -> None:
    with pytest.raises(UsageError, match="does not go back to; give a number, or leave out sharding"):
        options(sharding="fsdp")


@pytest.mark.parametrize("value", ["automatic", "0", "-1", "nan", "inf"])
def test_rates_that_are_none(options, value: str) -> None:
    with pytest.raises(
        UsageError, match=f"learning.rate: input should be .* or 'auto', but it is .?{re.escape(value)}"
    ):
        options(learning_rate=value)


def test_full_has_a_search_too(options) -> None:
    report = train(TrainOptions.build({**options().model_dump(exclude={"r"}), "method": "full"}))
    assert report.zeros and dict(report.rates_tried)[report.learning_rate] == min(dict(report.rates_tried).values())


def test_training_that_only_harms_is_said_and_undone(options, caplog, monkeypatch, tmp_path) -> None:
    scripted = iter([1.0, 2.0])
    monkeypatch.setattr(trainer.SppTrainer, "_validation_loss", lambda self: next(scripted))
    with caplog.at_level(logging.WARNING, "spp"):
        report = train(options(learning_rate=0.5, validation=20, max_steps=4))
    assert report.best_step == 0 and report.validation == [(0, 1.0), (4, 2.0)]
    assert "training only made the loss on held-out examples worse (it was 1.0000 before)" in caplog.text
    factors = load_file(report.out / "adapter_model.safetensors")
    starts = {name: factor for name, factor in factors.items() if ".spp_A" in name}
    assert starts and not any(factor.any() for factor in starts.values())
