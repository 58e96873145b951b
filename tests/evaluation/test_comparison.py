"""Several models side by side: the table, the chart in a file, and what cannot be compared."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from peft import get_peft_model

from spp.adapters.tuner import SppConfig
from spp.cli.entry_point import main

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def models(tmp_path, tiny_checkpoint, tiny_model) -> list[str]:
    """A model, a copy of it, and an adapter that names the model."""
    shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    adapted = get_peft_model(tiny_model("llama"), SppConfig(r=4, target_modules="all-linear"))
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_checkpoint)
    adapted.save_pretrained(tmp_path / "adapter")
    return [str(tiny_checkpoint), str(tmp_path / "copy"), str(tmp_path / "adapter")]


def fails(capsys, *words: object) -> str:
    assert main(["eval", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def test_perplexities_are_shown_side_by_side(models, stories, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["eval", *models, "--text", str(stories), "--limit", "3"]
    assert main([*words, "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)["models"]
    assert list(reports) == models
    base, copy, adapter = (report["perplexity"] for report in reports.values())
    assert base == copy == pytest.approx(adapter)  # a new adapter changes nothing

    monkeypatch.setenv("COLUMNS", "400")
    assert main([*words, "--compare"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in models) and "plotted in comparison.svg" in printed
    chart = ET.parse("comparison.svg").getroot()
    bars = [bar for bar in chart.iter(f"{SVG}rect") if bar.get("class") != "track"]
    assert [bar.get("class") for bar in bars] == ["shade0", "shade1", "shade2"]
    assert bars[0].get("width") == bars[1].get("width")
    labels = [text.text for text in chart.iter(f"{SVG}text")]
    assert labels[::2] == ["perplexity: dense", "perplexity: copy", "perplexity: adapter"]


def test_perplexities_of_other_windows_are_called_out(models, stories, capsys):
    config = Path(models[1]) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 32}))
    words = ["eval", *models[:2], "--text", str(stories), "--limit", "3", "--no-per-document"]
    assert main(words) == 0
    assert "these perplexities cannot be compared" in capsys.readouterr().err
    assert main([*words, "--window", "32"]) == 0
    assert "cannot be compared" not in capsys.readouterr().err


def test_nothing_is_overwritten_unless_asked(models, stories, tmp_path, capsys):
    plot = tmp_path / "mine.svg"
    plot.write_text("years of work")
    words = [*models[:2], "--text", stories, "--limit", "3", "--compare", "--plot", plot]
    assert "exists; name another file with --plot, or pass --overwrite" in fails(capsys, *words)
    assert plot.read_text() == "years of work"
    assert main(["eval", *map(str, words), "--overwrite"]) == 0
    assert "perplexity" in plot.read_text()


def test_requests_that_cannot_be_met_are_refused(models, stories, tmp_path, capsys):
    first, second, adapter = models
    words = ["--text", stories, "--compare"]
    assert "compare and plot need two models or more" in fails(capsys, first, *words)
    assert "is named twice" in fails(capsys, first, first, *words)
    assert "adapter goes with one model" in fails(capsys, first, second, *words, "--adapter", adapter)
    assert "name a file that ends in .svg" in fails(capsys, first, second, *words, "--plot", tmp_path / "plot.png")
    (tmp_path / "folder.svg").mkdir()
    assert "is a folder; name a file" in fails(
        capsys, first, second, *words, "--plot", tmp_path / "folder.svg", "--overwrite"
    )
    assert "there is no folder" in fails(capsys, first, second, *words, "--plot", tmp_path / "no" / "plot.svg")
    assert "plot is where --compare draws" in fails(capsys, first, second, "--plot", tmp_path / "plot.svg")
    message = fails(capsys, first, tmp_path / "a", tmp_path / "b", *words)
    assert "2 problems" in message and "no such folder" in message


def test_an_adapter_whose_model_is_missing_is_refused_with_the_remedy(models, stories, tmp_path, capsys):
    shutil.rmtree(models[0])
    message = fails(capsys, models[2], "--text", stories)
    assert f"is for the model '{models[0]}'" in message and "pass the model itself, and --adapter" in message
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    assert "does not say which model it is for" in fails(capsys, models[2], "--text", stories)
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": ["a"]}))
    assert "does not say which model it is for" in fails(capsys, models[2], "--text", stories)


def test_files_that_are_no_settings_are_an_error(models, stories, tmp_path, capsys):
    (tmp_path / "adapter" / "spp.json").write_text("[]")
    words = ["eval", "--text", str(stories)]
    assert main([*words, models[2]]) == 1
    assert "spp.json: a JSON object is expected" in capsys.readouterr().err
    (tmp_path / "adapter" / "adapter_config.json").write_text("[]")
    assert main([*words, models[2]]) == 1
    assert "adapter_config.json: a JSON object is expected" in capsys.readouterr().err
