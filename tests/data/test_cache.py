"""The cache folder: where it is, and that nothing about it can fail."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from spp.data.cache import cache_folder, cache_name, read_entry, write_entry

NAME = cache_name("thing", [1, "two"])
TENSORS = {"a": torch.arange(6).reshape(2, 3)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder that is not there yet."""
    folder = tmp_path / "deep" / "cache"
    monkeypatch.setenv("SPP_CACHE", str(folder))
    return folder


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SPP_CACHE": "/one", "XDG_CACHE_HOME": "/two"}, "/one"),
        ({"SPP_CACHE": "~/one"}, "/home/eve/one"),
        ({"SPP_CACHE": "", "XDG_CACHE_HOME": "/two"}, "/two/spp"),
        ({"XDG_CACHE_HOME": ""}, "/home/eve/.cache/spp"),
        ({}, "/home/eve/.cache/spp"),
    ],
)
def test_variables_name_the_folder(variables, expected, monkeypatch):
    monkeypatch.delenv("SPP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in ({"HOME": "/home/eve"} | variables).items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_names_tell_kinds_and_facts_apart():
    facts = ([1, "two"], ["1", "two"], [1, ["two"]])
    assert len({cache_name(kind, one) for kind in ("thing", "other") for one in facts}) == 6
    assert cache_name("thing", {"a": 1, "b": 2}) == cache_name("thing", {"b": 2, "a": 1})


def test_an_entry_comes_back_and_can_be_replaced(cache):
    assert read_entry(NAME) is None
    for fact in ("first", "second"):
        write_entry(NAME, TENSORS, {"kind": fact})
        found = read_entry(NAME)
        assert found is not None
        tensors, facts = found
        assert tensors.keys() == {"a"}
        assert tensors["a"].equal(TENSORS["a"])
        assert facts == {"kind": fact}
    assert [path.name for path in cache.iterdir()] == [NAME]  # nothing half-written beside it


def test_a_damaged_entry_is_none(cache, caplog):
    write_entry(NAME, TENSORS, {})
    (cache / NAME).write_bytes((cache / NAME).read_bytes()[:-1])
    with caplog.at_level(logging.INFO, "spp"):
        assert read_entry(NAME) is None
    assert "cannot be read and is made again" in caplog.text


def test_a_folder_that_cannot_be_written_is_no_error(cache, caplog):
    cache.parent.write_text("a file where the folder would be")
    with caplog.at_level(logging.INFO, "spp"):
        write_entry(NAME, TENSORS, {})
    assert "is not kept in the cache" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert read_entry(NAME) is None


def test_a_failed_write_leaves_nothing_and_the_old_entry(cache, monkeypatch):
    write_entry(NAME, TENSORS, {"kind": "old"})

    def full(tensors, path, facts):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("spp.data.cache.save_file", full)
    write_entry(NAME, TENSORS, {"kind": "new"})
    assert [path.name for path in cache.iterdir()] == [NAME]
    assert read_entry(NAME)[1] == {"kind": "old"}


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SPP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    write_entry(NAME, TENSORS, {})
    assert read_entry(NAME) is None
