"""Calibration windows: the published protocol, its fallback, and what makes a draw repeatable."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from spp.data import calibration
from spp.data.calibration import calibration_windows
from spp.errors import UsageError

BOS, EOS = 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPP_CACHE", str(folder))
    return folder


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
    assert drawn.kind == "windows of packed documents"
    drawn = calibration_windows(tiny_tokenizer, corpus(["a" * 10] * 3), samples=3, window=10, seed=0)
    assert drawn.kind == "a random window of each document longer than the window"


def test_places_are_random_up_to_the_very_end(tiny_tokenizer, corpus):
    source = corpus([LETTERS[:8]] * 200)
    drawn = calibration_windows(tiny_tokenizer, source, samples=200, window=6, seed=0)
    starts = {text_of(tiny_tokenizer, row).removeprefix("<bos>")[0] for row in drawn.windows}
    assert starts == {"a", "b", "c"}
    rows = {text_of(tiny_tokenizer, row) for row in drawn.windows}
    assert rows == {"<bos>abcde", "abcdef", "bcdefg", "cdefgh"}


@pytest.mark.parametrize("samples", [16, 22])
def test_shorter_documents_fill_up_what_the_long_ones_leave(tiny_tokenizer, mixed, samples):
    drawn = calibration_windows(tiny_tokenizer, mixed, samples=samples, window=12, seed=0)
    assert drawn.windows.shape == (samples, 12)
    # l to z are longer than the window; a to k have 66 letters and 22 special tokens, which make 7 windows.
    packed = samples - 15
    assert drawn.kind == f"15 windows of documents longer than the window, {packed} of packed shorter ones"
    texts = [text_of(tiny_tokenizer, row) for row in drawn.windows]
    assert {text.removeprefix("<bos>")[0] for text in texts[:15]} == set(LETTERS[11:])
    assert not set(LETTERS[11:]) & set("".join(texts[15:]).replace("<bos>", "").replace("<eos>", ""))
    if samples == 22:  # all that there is, but for the incomplete last window
        assert "".join(texts[15:]).count("<eos>") >= 9


def test_documents_are_packed_in_random_order(tiny_tokenizer, corpus):
    source = corpus([letter * 2 for letter in LETTERS])
    drawn = calibration_windows(tiny_tokenizer, source, samples=26, window=4, seed=0)
    texts = [text_of(tiny_tokenizer, row) for row in drawn.windows]
    assert sorted(texts) == [f"<bos>{letter * 2}<eos>" for letter in LETTERS]
    assert texts != sorted(texts)


def test_only_as_many_short_documents_are_kept_as_are_needed(tiny_tokenizer, corpus, monkeypatch):
    kept = []
    real = calibration._packed
    monkeypatch.setattr(calibration, "_packed", lambda pieces, *rest: kept.extend(pieces) or real(pieces, *rest))
    drawn = calibration_windows(tiny_tokenizer, corpus(["abcd"] * 1000), samples=8, window=10, seed=0)
    assert drawn.windows.shape == (8, 10)
    assert len(kept) == 8 * 10 // 5


def test_blank_documents_do_not_count(tiny_tokenizer, corpus):
    source = corpus(["", "abc", " \n", "", "abc"])
    drawn = calibration_windows(tiny_tokenizer, source, samples=2, window=5, seed=0)
    assert [text_of(tiny_tokenizer, row) for row in drawn.windows] == ["<bos>abc<eos>"] * 2


def test_long_documents_are_cut_where_the_short_ones_are_too_few(tiny_tokenizer, mixed):
    drawn = calibration_windows(tiny_tokenizer, mixed, samples=23, window=12, seed=0)
    assert drawn.kind == "windows of packed documents"
    assert drawn.windows.shape == (23, 12)
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
    assert drawn.kind == "windows cut from one document"
    assert len({tuple(row.tolist()) for row in drawn.windows}) >= 2
    possible = {f"<bos>{LETTERS[:12]}", LETTERS[12:25], f"z{LETTERS[:12]}"}
    assert {text_of(tiny_tokenizer, row) for row in drawn.windows} <= possible


@pytest.mark.parametrize("samples", [8, 20, 28])  # long documents, short ones as well, all of them packed
def test_the_seed_determines_the_windows(tiny_tokenizer, mixed, samples, cache):
    def draw(seed):
        shutil.rmtree(cache, ignore_errors=True)
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


def test_large_corpora_are_not_tokenized_to_their_end(tiny_tokenizer, corpus, monkeypatch):
    seen = []

    def counted(records, tokenizer):
        seen.extend(records)
        return real(records, tokenizer)

    real = calibration.documents
    monkeypatch.setattr(calibration, "documents", counted)
    calibration_windows(tiny_tokenizer, corpus(["x" * 20] * 2000), samples=4, window=8, seed=0)
    assert len(seen) < 500


def test_less_text_than_a_window_is_an_error(tiny_tokenizer, corpus):
    with pytest.raises(UsageError, match="fewer tokens than one window of 64; pass a smaller --window, or give"):
        calibration_windows(tiny_tokenizer, corpus(["short", "texts"]), samples=1, window=64, seed=0)


def test_the_standard_library_gives_its_calibration_part(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("spp.data.records.standard_library", lambda part: [f"{part} " * 4])
    drawn = calibration_windows(tiny_tokenizer, "python-stdlib", samples=1, window=32, seed=0)
    assert "calibration" in text_of(tiny_tokenizer, drawn.windows[0])
    assert drawn.source == "python-stdlib"


def refuse(*_, **__):
    pytest.fail("tokenized")


def test_windows_that_were_drawn_before_come_from_the_cache(tiny_tokenizer, mixed, cache, monkeypatch, caplog):
    request = {"samples": 128, "window": 12, "seed": 3}
    first = calibration_windows(tiny_tokenizer, mixed, **request)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", refuse)
    monkeypatch.setattr(calibration, "load_records", refuse)
    with caplog.at_level(logging.WARNING, "spp"):
        again = calibration_windows(tiny_tokenizer, mixed, **request)
    assert again.windows.equal(first.windows)
    assert again.windows.dtype == torch.int64
    assert (again.kind, again.sha256, again.source) == (first.kind, first.sha256, first.source)
    assert "has only 33 calibration windows" in caplog.text


def test_the_standard_library_comes_from_the_cache_while_it_stays_the_same(tiny_tokenizer, monkeypatch, cache):
    text = "abc" * 20
    monkeypatch.setattr("spp.data.records.standard_library", lambda _: [text])
    request = {"source": "python-stdlib", "samples": 1, "window": 32, "seed": 0}
    first = calibration_windows(tiny_tokenizer, **request)
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "__call__", refuse)
        assert calibration_windows(tiny_tokenizer, **request).windows.equal(first.windows)
    text = "xyz" * 20
    assert "x" in text_of(tiny_tokenizer, calibration_windows(tiny_tokenizer, **request).windows[0])


def test_whatever_the_windows_depend_on_is_told_apart(tiny_tokenizer, tmp_path, cache):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one two three"}\n' * 8)
    request = {"samples": 4, "window": 8, "seed": 0}

    def entries(tokenizer, source, **changes) -> int:
        calibration_windows(tokenizer, str(source), **(request | changes))
        return len(list(cache.iterdir()))

    assert entries(tiny_tokenizer, path) == 1
    assert entries(tiny_tokenizer, path) == 1
    assert entries(tiny_tokenizer, path.rename(tmp_path / "b.jsonl")) == 1  # the same content
    assert entries(tiny_tokenizer, (tmp_path / "b.jsonl").rename(tmp_path / "b.txt")) == 2  # read in another way
    path.write_text('{"text": "one two three"}\n' * 9)
    assert entries(tiny_tokenizer, path) == 3
    for count, change in enumerate(({"samples": 3}, {"window": 9}, {"seed": 1}), 4):
        assert entries(tiny_tokenizer, path, **change) == count
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<unk>")
    assert entries(tokenizer, path) == 7
    tokenizer.chat_template = "{{ messages }}"
    assert entries(tokenizer, path) == 8
    tokenizer.add_tokens(["two"])
    assert entries(tokenizer, path) == 9


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def changed(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def other_tensors(path: Path) -> None:
    save_file({"other": torch.zeros(1)}, path)


@pytest.mark.parametrize("damage", [truncated, changed, emptied, other_tensors])
def test_a_damaged_entry_is_made_again(tiny_tokenizer, mixed, cache, damage):
    request = {"samples": 8, "window": 12, "seed": 0}
    first = calibration_windows(tiny_tokenizer, mixed, **request)
    [entry] = cache.iterdir()
    damage(entry)
    again = calibration_windows(tiny_tokenizer, mixed, **request)
    assert again.windows.equal(first.windows)
    assert again.kind == first.kind
    assert load_file(entry)["windows"].equal(first.windows)


def test_a_tokenizer_in_python_is_not_cached(tiny_tokenizer, mixed, cache, monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    drawn = calibration_windows(tiny_tokenizer, mixed, samples=8, window=12, seed=0)
    assert drawn.windows.shape == (8, 12)
    assert not cache.exists()


def test_an_error_is_not_cached(tiny_tokenizer, corpus, cache):
    with pytest.raises(UsageError):
        calibration_windows(tiny_tokenizer, corpus(["short"]), samples=1, window=64, seed=0)
    assert not cache.exists()
