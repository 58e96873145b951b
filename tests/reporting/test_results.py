"""The model of results.json: what is read is written again as it was, and it has a field for all that a run writes."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest
from pydantic import BaseModel, ValidationError
from realistic_results import failed, realistic

from spp.checkpoints.verify import VerifyReport
from spp.ops.zero_proof import TensorProof
from spp.pruning.prune import TensorSparsity
from spp.reporting.results import (
    ComparedTensor,
    PrunedTensor,
    RunResults,
    Training,
    Verification,
    gap_closed,
    warnings_about,
)
from spp.training.train import TrainReport


@pytest.mark.parametrize("make", [realistic, failed])
def test_what_was_read_is_written_again_to_the_byte(make):
    text = json.dumps(make(2))
    assert json.dumps(RunResults.model_validate(json.loads(text)).plain()) == text


def test_what_a_newer_version_added_is_kept():
    results = realistic(1)
    results["protocol"]["weather"] = {"rain": True}
    results["weather"] = [1, None]
    assert RunResults.model_validate(results).plain() == results


def test_what_is_missing_or_null_is_none_or_empty():
    least = {"perplexity": {}, "protocol": {}}
    missing = RunResults.model_validate(least)
    null = RunResults.model_validate(least | dict.fromkeys(RunResults.model_fields.keys() - least))
    for results in (missing, null):
        assert results.gap_closed is None and results.command is None and results.seconds == {}
        assert results.training == Training() and results.training.losses == []
        assert results.verification.problems == []
    assert missing.plain() == least


def test_results_are_frozen():
    results = RunResults.model_validate(realistic(1))
    with pytest.raises(ValidationError, match="frozen"):
        results.verified = False  # type: ignore[misc]


@pytest.mark.parametrize(
    ("model", "report"),
    [
        (Training, TrainReport),
        (Verification, VerifyReport),
        (ComparedTensor, TensorProof),
        (PrunedTensor, TensorSparsity),
    ],
)
def test_the_fields_are_those_of_the_report_that_is_written(model: type[BaseModel], report: type):
    assert list(model.model_fields) == [field.name for field in fields(report)]


def test_gap_closed_gives_values_computed_by_hand():
    assert gap_closed(dense=math.e, pruned=math.e**3, spp=math.e**2) == pytest.approx(0.5)
    assert gap_closed(dense=10.0, pruned=20.0, spp=20.0) == 0
    assert gap_closed(dense=10.0, pruned=20.0, spp=10.0) == pytest.approx(1)
    assert gap_closed(dense=10.0, pruned=10.0, spp=9.0) is None


def test_there_is_no_gap_where_pruning_cost_under_one_percent():
    assert gap_closed(10.0, 10.05, 11.0) is None
    assert gap_closed(10.0, 10.2, 10.1) == pytest.approx(0.4975, abs=1e-4)


@pytest.mark.parametrize(
    ("perplexity", "worse"),
    [
        ({"dense": 10.0, "pruned": 20.0, "spp": 15.0}, False),
        ({"dense": 10.0, "pruned": 20.0, "spp": 21.0}, True),
        ({"dense": 10.0, "pruned": 20.0, "reconstructed": 14.0, "spp": 15.0}, True),
        ({"dense": 10.0, "pruned": 20.0, "spp": math.inf}, True),
    ],
)
def test_fine_tuning_that_made_it_worse_is_said(perplexity, worse):
    warnings = warnings_about(perplexity)
    assert len(warnings) == worse and all("fine-tuning made the model worse" in one for one in warnings)
