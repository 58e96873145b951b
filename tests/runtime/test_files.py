"""What others made: whatever goes wrong while a file is read or written is one clear error that names it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from full_disk import files_of_at_most
from safetensors import SafetensorError
from safetensors.torch import save_file

from spp.checkpoints.json_files import read_json, read_object, write_json, write_text
from spp.checkpoints.safetensors_file import Layout, TensorFile, read_header, save_tensors
from spp.errors import SppError, UsageError, brief, shown
from spp.models.blockwise.hidden_states import FolderStates, State, StatesWriter
from spp.runtime.files import is_disk_full, reading, user_path, writing


class PanicException(BaseException):
    """Named as the one that libraries in Rust raise."""


@pytest.mark.parametrize(
    "error", [RecursionError("deep"), OverflowError("big"), SafetensorError("bad"), PanicException("no")]
)
def test_every_error_of_a_library_becomes_ours(tmp_path, error):
    (path := tmp_path / "file").write_text("x")
    with (
        pytest.raises(SppError, match=f"file: not a whole file .{error}.; copy it again"),
        reading(path, "a whole file", "copy it again"),
    ):
        raise error


def test_an_interrupt_stays_one(tmp_path):
    (path := tmp_path / "file").write_text("x")
    with pytest.raises(KeyboardInterrupt), reading(path, "a file"):
        raise KeyboardInterrupt


def test_pipes_folders_and_missing_files_are_refused_before_they_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("pipe", "pipe or a device"), (".", "is a folder"), ("none", "no such file")):
        with pytest.raises(UsageError, match=words):
            read_json(tmp_path / name)
    with pytest.raises(UsageError, match="pipe or a device"):
        read_header(tmp_path / "pipe")


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path, monkeypatch):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # as for root, who may read everything
    with pytest.raises(UsageError, match="may not be read .Permission denied."):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 6000 + "}", '{"a": ' + "9" * 400 + "}", "{", "\x00"])
def test_damaged_json_is_one_error(tmp_path, text):
    (path := tmp_path / "spp.json").write_text(text)
    with pytest.raises(SppError, match="spp.json: not valid JSON") as caught:
        read_object(path)
    assert len(str(caught.value)) < 500


def test_a_header_that_changes_while_it_is_read_is_one_error(tmp_path, monkeypatch):
    save_file({"a": torch.ones(1)}, path := tmp_path / "model.safetensors")
    monkeypatch.setattr(json, "loads", lambda *_: {"a": {}})
    with pytest.raises(SppError, match="not a whole safetensors file"):
        read_header(path)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_names_the_file_whatever_library_writes(tmp_path):
    tensors = {"a": torch.ones(100_000)}
    with files_of_at_most(4096):
        with pytest.raises(OSError, match="adapter.safetensors"):
            save_tensors(tmp_path / "adapter.safetensors", tensors)
        with pytest.raises(OSError, match="checkpoint"), writing(Path("checkpoint")):
            torch.save(tensors, tmp_path / "optimizer.pt")
        with pytest.raises(OSError, match="report.html"):
            write_text(tmp_path / "report.html", "x" * 10_000)
        with pytest.raises(OSError, match="000003.safetensors"):
            FolderStates(tmp_path, StatesWriter())[3] = State(torch.ones(1, 1, 100_000))
    assert not list(tmp_path.glob("*report*"))


def test_the_number_of_an_error_survives_a_library():
    with pytest.raises(OSError, match="model") as caught, writing(Path("model")):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert is_disk_full(caught.value) and caught.value.filename == "model"
    with pytest.raises(ValueError, match="other"), writing(Path("model")):
        raise ValueError("other")


def test_a_full_disk_leaves_nothing_behind_and_an_old_file_as_it_was(tmp_path, monkeypatch):
    write_json(path := tmp_path / "spp.json", {"old": 1})
    for module in ("spp.checkpoints.json_files", "spp.checkpoints.safetensors_file"):
        monkeypatch.setattr(f"{module}.sync", full)
    for write in (
        lambda: write_text(path, "new"),
        lambda: TensorFile(tmp_path / "model.safetensors", {"a": Layout("F32", (1,), 4)}),
    ):
        with pytest.raises(OSError, match="No space left on device: .*spp.json|model.safetensors"):
            write()
    assert [one.name for one in tmp_path.iterdir()] == ["spp.json"] and read_json(path) == {"old": 1}


def test_our_own_errors_pass_where_something_is_written():
    with pytest.raises(SppError, match="ours"), writing(Path("x")):
        try:
            full()
        except OSError as error:
            raise SppError("ours") from error


def test_home_folders_of_nobody_and_names_that_are_no_text():
    assert user_path("~") == Path.home()
    for text, words in (("~nosuchuser/x", "no user 'nosuchuser'"), ("a\udcff", "not UTF-8"), ("a\0b", "NUL")):
        with pytest.raises(UsageError, match=words):
            user_path(text)


def test_values_are_cut_before_they_are_written_out():
    bomb: list[object] = ["x"]
    for _ in range(60):
        bomb = [bomb] * 9
    itself: list[object] = []
    itself.append(itself)
    for value in (bomb, itself, 10**5000, "x" * 10**6, {1: bomb}):
        assert len(shown(value)) <= 60
    assert shown("2:4") == "'2:4'" and shown([1, 2]) == "[1, 2]"
    assert len(brief(ValueError("x" * 10**6))) <= 400
