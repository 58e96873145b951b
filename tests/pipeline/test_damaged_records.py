"""Records of a run that were damaged: a stage without a whole record is run again, or one error names the file."""

from __future__ import annotations

import json

import pytest

from spp.cli.entry_point import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The words of a small run, and its folder."""
    out = tmp_path_factory.mktemp("run") / "run"
    words = [
        "run",
        "--effort",
        "quick",
        "--out",
        str(out),
        "--max-steps",
        "1",
        "--window",
        "32",
        "--criterion",
        "magnitude",
        "--limit",
        "2",
    ]
    assert main([*words]) == 0
    return words, out


def again(words, capsys):
    capsys.readouterr()
    code = main(words)
    message = capsys.readouterr().err
    assert "Traceback" not in message and len(message) < 5000
    return code, message


def test_a_finished_run_can_be_repeated(finished, capsys):
    words, out = finished
    before = json.loads((out / "results.json").read_text())
    code, message = again(words, capsys)
    assert code == 0 and message.count("done before") == len(before["seconds"])
    after = json.loads((out / "results.json").read_text())
    assert list(after["seconds"].items()) == list(before["seconds"].items())


def test_a_run_that_was_killed_while_it_wrote_the_card_merges_again(finished, capsys):
    words, out = finished
    record = out / "stages" / "merge.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "output_sha256": None}))
    code, message = again(words, capsys)
    assert code == 0 and "merge ..." in message
    assert again(words, capsys)[0] == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"report": {}}',
        '{"report": [], "seconds": "x"}',
        "[" * 100_000,
        '{"seconds": ' + "9" * 6000 + "}",
        "\x00",
    ],
)
def test_a_stage_with_a_damaged_record_is_run_again(finished, capsys, text):
    words, out = finished
    record = out / "stages" / "verify.json"
    record.write_text(text)
    code, message = again(words, capsys)
    assert code == 0 and "verify.json" in message, message and "run again" in message
    assert json.loads(record.read_text())["report"]["verified"] is True


@pytest.mark.parametrize("report", [{}, {"perplexity": "x"}, {"perplexity": 0.0}, {"perplexity": [1]}])
def test_a_record_with_a_damaged_report_is_one_error(finished, capsys, report):
    words, out = finished
    path = out / "stages" / "evaluate_dense.json"
    whole = path.read_text()
    path.write_text(json.dumps({**json.loads(whole), "report": report}))
    code, message = again(words, capsys)
    path.write_text(whole)
    assert code == 1 and "was damaged after its stage had finished" in message


@pytest.mark.parametrize(
    "text", ["", "[]", '{"options": 1}', "[" * 100_000, '{"options": {}, "inputs": "x", "circumstances": []}']
)
def test_a_damaged_request_is_one_error(finished, capsys, text):
    words, out = finished
    whole = (out / "run.json").read_text()
    (out / "run.json").write_text(text)
    code, message = again(words, capsys)
    (out / "run.json").write_text(whole)
    assert code == 2 and "run.json is damaged" in message
