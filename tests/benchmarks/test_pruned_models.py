"""The benchmarks of whole models run, and say what they claim. Nothing here looks at how long anything took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bits, common, pruned_quality, streaming
from benchmarks.evaluated_models import EvaluatedModel
from scripts import make_synthetic_model

CASE = ["--samples", "4", "--window", "16", "--threads", "1"]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "dense"
    assert make_synthetic_model.main(["--gigabytes", "0.001", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_streaming_prints_one_object(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    streaming.main([str(dense), *CASE, "--json"])
    row = json.loads(capsys.readouterr().out)
    assert row["blocks"] >= 4 and row["disk_bytes"] == pytest.approx(1e6, rel=0.05)
    assert min(row["peak_bytes"], row["killed_peak_bytes"], row["resumed_peak_bytes"]) > 10**8
    assert 0 < row["forward_seconds"] + row["criterion_seconds"] < row["seconds"]
    assert 0 < row["overhead"] < 1
    assert [path.name for path in dense.parent.iterdir()] == ["dense"]  # no result is left


@pytest.mark.slow
def test_streaming_notices_other_bits(
    dense: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = streaming._run

    def changed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found = real(*args, **kwargs)
        weights = args[1] / "model-00001-of-00001.safetensors"
        if args[1].name == "whole":
            weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
        return found

    monkeypatch.setattr(streaming, "_run", changed)
    with pytest.raises(SystemExit, match="other bits in model-00001-of-00001.safetensors"):
        streaming.main([str(dense), *CASE, "--json"])


@pytest.fixture
def small(dense: Path, stories: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluatedModel:
    """The only model that there is."""
    texts = {"calibration": str(stories), "evaluation": str(stories)}
    evaluated = EvaluatedModel(name="small", model=str(dense), window=16, limit=8, samples=4, **texts)
    monkeypatch.setattr(pruned_quality, "evaluated_models", lambda *_: [evaluated])
    return evaluated


def test_quality_appends_a_row_for_each_cell(small: EvaluatedModel, tmp_path: Path) -> None:
    path = tmp_path / "pruned_quality.csv"
    methods = ["magnitude", "wanda + owl", "wanda + reconstruction"]
    pruned_quality.main(["--pattern", "50%", "2:4", "--method", *methods, "--csv", str(path)])
    rows = common.read_rows(path)
    assert [(row["pattern"], row["method"]) for row in rows] == [
        *(("50%", method) for method in methods),
        ("2:4", "magnitude"),  # OWL is not for N:M
        ("2:4", "wanda + reconstruction"),
    ]
    assert all(float(row["sparsity"]) == pytest.approx(0.5, abs=0.02) for row in rows)
    assert {row["trained_perplexity"] for row in rows} == {""}
    assert {row["protocol"] for row in rows} == {"stories, first 8 documents, each document by itself, 16 tokens"}


def test_quality_trains_and_leaves_out_what_does_not_divide(small: EvaluatedModel, tmp_path: Path) -> None:
    path = tmp_path / "pruned_quality.csv"
    options = ["--pattern", "2:4", "5:7", "--method", "wanda", "--then-train", "2", "--csv", str(path)]
    pruned_quality.main(options)
    (row,) = common.read_rows(path)
    assert row["trained_steps"] == "2" and float(row["trained_perplexity"]) > 1
    assert row["trained_perplexity"] != row["perplexity"]


def test_bits_appends_a_row_for_each_cell_once(small: EvaluatedModel, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bits, "evaluated_models", lambda *_: [small])
    monkeypatch.setattr(bits, "SAMPLES", 4)
    path = tmp_path / "bits.csv"
    options = ["--pattern", "dense", "2:4", "5:7", "--csv", str(path)]
    bits.main([*options, "--bits", "4", "--method", "nearest"])
    bits.main([*options, "--bits", "4", "2"])
    found = [
        (row["pattern"], row["method"], row["bits"], float(row["bits_per_weight"])) for row in common.read_rows(path)
    ]
    # 16 bits for a scale of 64 columns at most, of which small matrices have few.
    scales = found[1][3] - 4
    assert 0.25 <= scales < 1
    assert found == [
        ("dense", "float", "16", 16),
        ("dense", "nearest", "4", pytest.approx(4 + scales)),
        ("2:4", "float", "16", pytest.approx(9, abs=0.01)),
        ("2:4", "nearest", "4", pytest.approx(3 + scales, abs=0.01)),
        ("dense", "feedback", "4", pytest.approx(4 + scales)),
        ("dense", "nearest", "2", pytest.approx(2 + scales)),
        ("dense", "feedback", "2", pytest.approx(2 + scales)),
        ("2:4", "feedback", "4", pytest.approx(3 + scales, abs=0.01)),
        ("2:4", "nearest", "2", pytest.approx(2 + scales, abs=0.01)),
        ("2:4", "feedback", "2", pytest.approx(2 + scales, abs=0.01)),
    ]
    assert all(float(row["perplexity"]) > 1 for row in common.read_rows(path))
