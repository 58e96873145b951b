"""The beginning-of-text token of perplexity: in each window, nowhere, or as the tokenizer adds it."""

from __future__ import annotations

import json

import pytest

from spp.cli.entry_point import main
from spp.errors import UsageError
from spp.evaluation.options import EvalOptions
from spp.evaluation.perplexity import read_windows

BOS = 1


@pytest.fixture
def text(tmp_path):
    (path := tmp_path / "text.txt").write_text("abcdefghij" * 4)
    return path


def windows(model, text, **options):
    return read_windows(EvalOptions.build({"model": str(model), "text": str(text), "window": 8, **options}), model)


@pytest.mark.parametrize("per_document", [False, True])
def test_windows_begin_as_asked(tiny_checkpoint, text, per_document):
    found = {
        bos: windows(tiny_checkpoint, text, bos=bos, per_document=per_document) for bos in ("auto", "always", "never")
    }
    first = [[window[0] == BOS for window in one.windows] for one in found.values()]
    assert first[0] == [True, *[False] * (len(first[0]) - 1)] and all(first[1]) and not any(first[2])
    plain = [token for window in found["never"].windows for token in window]
    rest = [token for window in found["always"].windows for token in window[1:]]
    assert rest == plain[: len(rest)] and all(len(window) <= 8 for one in found.values() for window in one.windows)
    assert [one.bos for one in found.values()] == ["as the tokenizer adds it", "in each window", "nowhere"]


def test_gemma_gets_one_in_each_window_by_default(tmp_path, tiny_model, tiny_tokenizer, text):
    tiny_model("gemma").save_pretrained(tmp_path / "gemma")
    tiny_tokenizer.save_pretrained(tmp_path / "gemma")
    assert windows(tmp_path / "gemma", text).bos == "in each window"
    assert windows(tmp_path / "gemma", text, bos="never").bos == "nowhere"


def test_it_is_said_in_the_protocol(tiny_checkpoint, text, capsys):
    words = ["eval", str(tiny_checkpoint), "--text", str(text), "--window", "8", "--bos", "always"]
    assert main(words) == 0
    assert "BOS in each window" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bos"] == "in each window"


def test_a_tokenizer_without_one_is_refused(tiny_checkpoint, tiny_tokenizer, text):
    config = json.loads((tiny_checkpoint / "tokenizer_config.json").read_text())
    config.pop("bos_token")
    (tiny_checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="bos always: .*no beginning-of-text token"):
        windows(tiny_checkpoint, text, bos="always")


def test_tasks_have_their_own(tmp_path):
    with pytest.raises(UsageError, match="bos: tasks bring their own text"):
        EvalOptions.build({"model": "m", "tasks": "paper", "bos": "always"})
