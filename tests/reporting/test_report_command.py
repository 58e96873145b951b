"""`spp report`: from folders to a page, and one clear message for what is no run."""

from __future__ import annotations

import json

import pytest
from realistic_results import realistic

from spp.checkpoints.lock import locked
from spp.cli.entry_point import main


@pytest.fixture
def runs(tmp_path):
    """Folders of two finished runs."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(realistic(1)))
    return [tmp_path / "first", tmp_path / "second"]


def report(*words: object) -> int:
    return main(["report", *map(str, words)])


def fails(capsys, code: int, *words: object) -> str:
    assert report(*words) == code
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("error: ") == 1
    return captured.err


def test_a_page_from_folders_and_files(runs, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    assert report(runs[0], runs[1] / "results.json", "--out", out) == 0
    assert f"first, second: written to {out}" in capsys.readouterr().out
    assert "Sparsity kept in all 2 runs" in out.read_text()
    assert report(runs[0], "--out", tmp_path / "one.html", "--json") == 0
    assert json.loads(capsys.readouterr().out)["runs"] == ["first"]
    assert "story, pruned 2:4 by Wanda" in (tmp_path / "one.html").read_text()


def test_runs_that_do_not_compare_are_named_on_the_terminal(runs, tmp_path, capsys):
    results = realistic(1)
    results["protocol"]["evaluation"]["window"] = 64
    (runs[1] / "results.json").write_text(json.dumps(results))
    assert report(*runs, "--out", tmp_path / "page.html") == 0
    assert "perplexities cannot be compared: the runs differ in window" in capsys.readouterr().out


def test_two_processes_never_write_the_same_page(runs, tmp_path, capsys):
    with locked(tmp_path / "page.html"):
        assert "another process is writing" in fails(capsys, 2, runs[0], "--out", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_an_existing_output_is_replaced_with_overwrite_only(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    out.write_text("mine")
    assert "--overwrite" in fails(capsys, 2, runs[0], "--out", out)
    assert out.read_text() == "mine"
    assert report(runs[0], "--out", out, "--overwrite") == 0
    assert "</html>" in out.read_text()
    capsys.readouterr()
    assert "is a folder" in fails(capsys, 2, runs[0], "--out", tmp_path, "--overwrite")
    before = (runs[0] / "results.json").read_text()
    message = fails(capsys, 2, runs[0], "--out", runs[0] / "results.json", "--overwrite")
    assert "is an input" in message and (runs[0] / "results.json").read_text() == before


def test_an_unfinished_run_is_refused_with_its_stages(tmp_path, capsys):
    stages = tmp_path / "run" / "stages"
    stages.mkdir(parents=True)
    for name in ("evaluate_dense", "prune"):
        (stages / f"{name}.json").write_text("{}")
    message = fails(capsys, 2, tmp_path / "run", "--out", tmp_path / "page.html")
    assert "unfinished" in message and "evaluate_dense, prune" in message and "repeat its spp run" in message
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("{", 1, "not valid JSON"),
        ("[1]", 2, "not the results of spp run"),
        ('{"a": 1}', 2, "not the results of spp run"),
        ('{"perplexity": {"dense": "low"}, "protocol": {}}', 2, "perplexity.dense: input should be a valid number"),
        ('{"perplexity": {}, "protocol": {"model": 3}}', 2, "protocol.model"),
        ('{"perplexity": {}, "protocol": {}, "training": {"losses": [[1, 2, 3]]}}', 2, "training.losses.0"),
        ('{"perplexity": {}, "protocol": {}, "sparsity": {"tensors": []}}', 2, "sparsity.tensors"),
        ('{"perplexity": {}, "protocol": {}, "verification": {"zeros": null, "problems": 1}}', 2, "problems"),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path, capsys, text, code, words):
    (tmp_path / "results.json").write_text(text)
    message = fails(capsys, code, tmp_path / "results.json", "--out", tmp_path / "page.html")
    assert words in message and "results.json" in message
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"a,b\n1,2\n", 2, "no column date, device, hardware among its columns (a, b)"),
        (b"", 2, "(nothing)"),
        (b"date,device,hardware\n", 2, "no benchmark rows"),
        (b"date,device,hardware\n1,2,3\n1,2\n", 2, "row 3 has 2 values for 3 columns"),
        (b"date,device,hardware,date\n1,2,3,4\n", 2, "more than one column has the name date"),
        (b'date,device,hardware\n"1,2,3\n', 1, "not CSV"),
        (b"date,device,hardware\n\xff,2,3\n", 1, "not CSV"),
    ],
)
def test_files_that_are_no_benchmarks_are_refused(runs, tmp_path, capsys, content, code, words):
    file = tmp_path / "rows.csv"
    file.write_bytes(content)
    message = fails(capsys, code, runs[0], "--benchmarks", file, "--out", tmp_path / "page.html")
    assert words in message and "rows.csv" in message


def test_several_problems_are_reported_together(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    out.touch()
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    words = [runs[0], tmp_path / "nowhere", tmp_path / "empty", broken, runs[0] / "results.json", "--out", out]
    message = fails(capsys, 2, *words, "--benchmarks", tmp_path / "no.csv")
    assert message.startswith("error: 6 problems")
    for part in ("exists", "nowhere: no such", "no results.json there", "not valid JSON"):
        assert part in message
    assert "given more than once" in message and "no.csv: no such file" in message


def test_old_results_make_a_page(tmp_path):
    """Figures that are missing, not finite or null are no reason to refuse a run."""
    old = '{"perplexity": {"dense": 9.0, "pruned": Infinity, "spp": null}, "protocol": {}, "verification": null}'
    (tmp_path / "results.json").write_text(old)
    assert report(tmp_path, "--out", tmp_path / "page.html") == 0
    assert "Not verified" in (tmp_path / "page.html").read_text()
