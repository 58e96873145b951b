"""Calibration windows: the published protocol, its fallback, and what makes a draw repeatable."""

from __future__ import annotations

import hashlib
import json
import logging
import random

import pytest

from spp.data.calibration import calibration_windows
from spp.errors import UsageError

BOS, EOS = 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def corpus(tmp_path):
    """Write documents to a .jsonl file and return its path."""

    def write(texts: list[str]) -> str:
        path = tmp_path / "corpus.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    return write


def text_of(tokenizer, row) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(row.tolist()))


@pytest.fixture
def mixed(corpus) -> str:
    """26 documents of one letter each: those of a, b, c, ... z have 1, 2, 3, ... 26 letters and a BOS token."""
    return corpus([letter * length for length, letter in enumerate(LETTERS, 1)])


def test_only_documents_longer_than_the_window_take_part_each_once(tiny_tokenizer, mixed):
    drawn = calibration_windows(tiny_tokenizer, mixed, samples=14, window=12, seed=0)
    assert drawn.windows.shape == (14, 12)
    assert drawn.kind == "a random window of each document longer than the window"
    # With BOS a document is one longer than its letters: more than 12 tokens begin at the 12th letter, l.
    seen = {text_of(tiny_tokenizer, row).removeprefix("<bos>")[0] for row in drawn.windows}
    assert len(seen) == 14
    assert seen <= set(LETTERS[11:])


def test_a_document_exactly_as_long_as_the_window_is_too_short(tiny_tokenizer, corpus):
    drawn = calibration_windows(tiny_tokenizer, corpus(["a" * 9] * 3), samples=3, window=10, seed=0)
    assert drawn.kind == "windows cut from joined documents"
    drawn = calibration_windows(tiny_tokenizer, corpus(["a" * 10] * 3), samples=3, window=10, seed=0)
    assert drawn.kind == "a random window of each document longer than the window"


def test_places_are_random_up_to_the_very_end(tiny_tokenizer, corpus):
    source = corpus([LETTERS[:8]] * 200)
    drawn = calibration_windows(tiny_tokenizer, source, samples=200, window=6, seed=0)
    starts = {text_of(tiny_tokenizer, row).removeprefix("<bos>")[0] for row in drawn.windows}
    assert starts == {"a", "b", "c"}
    rows = {text_of(tiny_tokenizer, row) for row in drawn.windows}
    assert rows == {"<bos>abcde", "abcdef", "bcdefg", "cdefgh"}


def test_too_few_long_documents_are_joined_instead(tiny_tokenizer, mixed):
    drawn = calibration_windows(tiny_tokenizer, mixed, samples=16, window=12, seed=0)
    assert drawn.kind == "windows cut from joined documents"
    assert drawn.windows.shape == (16, 12)
    # 1 + ... + 26 letters, with BOS and EOS for each document, make 403 tokens; whole documents follow each other.
    assert "<eos><bos>" in "".join(text_of(tiny_tokenizer, row) for row in drawn.windows)
    for token, length in zip(tiny_tokenizer.convert_tokens_to_ids(list(LETTERS)), range(1, 27), strict=True):
        assert (drawn.windows == token).sum() <= length


def test_fewer_windows_than_asked_are_a_warning(tiny_tokenizer, mixed, caplog):
    with caplog.at_level(logging.WARNING, "spp"):
        drawn = calibration_windows(tiny_tokenizer, mixed, samples=128, window=12, seed=0)
    assert drawn.windows.shape == (403 // 12, 12)
    assert "has only 33 calibration windows of 12 tokens, not 128" in caplog.text


def test_one_long_text_is_cut_into_windows(tiny_tokenizer, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(LETTERS * 10)
    drawn = calibration_windows(tiny_tokenizer, str(path), samples=4, window=13, seed=0)
    assert drawn.kind == "windows cut from joined documents"
    assert len({tuple(row.tolist()) for row in drawn.windows}) >= 2
    possible = {f"<bos>{LETTERS[:12]}", LETTERS[12:25], f"z{LETTERS[:12]}"}
    assert {text_of(tiny_tokenizer, row) for row in drawn.windows} <= possible


@pytest.mark.parametrize("samples", [8, 20])  # long documents, and joined ones
def test_the_seed_decides(tiny_tokenizer, mixed, samples):
    def draw(seed):
        return calibration_windows(tiny_tokenizer, mixed, samples=samples, window=12, seed=seed)

    random.seed(1)
    first = draw(0)
    random.seed(2)
    again, other = draw(0), draw(1)
    assert first.windows.equal(again.windows)
    assert first.sha256 == again.sha256
    assert not first.windows.equal(other.windows)
    assert first.sha256 != other.sha256


def test_the_hash_is_that_of_the_ids(tiny_tokenizer, corpus):
    source = corpus(["ab"])
    drawn = calibration_windows(tiny_tokenizer, source, samples=1, window=4, seed=0)
    a, b = tiny_tokenizer.convert_tokens_to_ids(["a", "b"])
    assert drawn.windows.tolist() == [[BOS, a, b, EOS]]
    expected = b"".join(token.to_bytes(8, "little") for token in (BOS, a, b, EOS))
    assert drawn.sha256 == hashlib.sha256(expected).hexdigest()
    assert drawn.source == source


def test_large_corpora_are_not_tokenised_to_their_end(tiny_tokenizer, corpus, monkeypatch):
    from spp.data import calibration

    seen = []

    def counted(records, tokenizer):
        seen.extend(records)
        return real(records, tokenizer)

    real = calibration.documents
    monkeypatch.setattr(calibration, "documents", counted)
    calibration_windows(tiny_tokenizer, corpus(["x" * 20] * 2000), samples=4, window=8, seed=0)
    assert len(seen) < 500


def test_less_text_than_a_window_is_an_error(tiny_tokenizer, corpus):
    with pytest.raises(UsageError, match="has fewer tokens than one window of 64; pass --window"):
        calibration_windows(tiny_tokenizer, corpus(["short", "texts"]), samples=1, window=64, seed=0)


def test_the_standard_library_gives_its_calibration_part(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("spp.data.records.standard_library", lambda part: [f"{part} " * 4])
    drawn = calibration_windows(tiny_tokenizer, "python-stdlib", samples=1, window=32, seed=0)
    assert "calibration" in text_of(tiny_tokenizer, drawn.windows[0])
    assert drawn.source == "python-stdlib"
