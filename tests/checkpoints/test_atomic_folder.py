"""Output folders: whole or absent, claimed by one process, resumed where they can be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spp.checkpoints.atomic_folder import WORK, check_output, new_folder, resumable_folder
from spp.checkpoints.json_files import read_json, write_json
from spp.errors import SppError, UsageError


def test_new_folder_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out, overwrite=False) as folder:
        (folder / "weights").write_text("all of it")
        assert not out.exists()
    assert (out / "weights").read_text() == "all of it"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_new_folder_leaves_nothing_behind_on_failure(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "out", overwrite=False) as folder:
        (folder / "weights").write_text("half of")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_keeps_the_old_result(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(RuntimeError), new_folder(out, overwrite=True):
        raise RuntimeError
    assert [path.name for path in out.iterdir()] == ["old"]
    with new_folder(out, overwrite=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_swept_away(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "stale").touch()
    with new_folder(tmp_path / "out", overwrite=False) as folder:
        assert not (folder / "stale").exists()


def test_outputs_never_cost_the_user_something(tmp_path):
    model = tmp_path / "work" / "model"
    model.mkdir(parents=True)
    (model / "config.json").touch()
    with pytest.raises(UsageError, match=r"not empty.*--overwrite"):
        check_output(model, overwrite=False)
    for out in (model, model.parent):
        with pytest.raises(UsageError, match="is or holds the input"):
            check_output(out, overwrite=True, inputs=[model])
    with pytest.raises(UsageError, match="is a file"):
        check_output(model / "config.json", overwrite=True)


def test_json_is_read_or_explained(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, 2]})
    assert read_json(path) == {"a": [1, 2]}
    path.write_text("{")
    with pytest.raises(SppError, match="not valid JSON"):
        read_json(path)
    with pytest.raises(UsageError, match="no such file"):
        read_json(tmp_path / "b.json")


def test_two_processes_never_make_the_same_folder(tmp_path: Path) -> None:
    other = f"""
from pathlib import Path
from spp.checkpoints.atomic_folder import new_folder
with new_folder(Path({str(tmp_path / "out")!r}), overwrite=False):
    print("claimed", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", other], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        for make in (
            new_folder(tmp_path / "out", overwrite=False),
            resumable_folder(tmp_path / "out", {}, overwrite=True),
        ):
            with pytest.raises(UsageError, match="another process is writing"), make:
                pass
        process.kill()
    with new_folder(tmp_path / "out", overwrite=False) as folder:  # the claim ended with the process
        (folder / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, MemoryError])
def test_a_resumable_folder_goes_on_after_what_is_no_fault_of_the_request(tmp_path: Path, error: type) -> None:
    out = tmp_path / "out"
    with pytest.raises(error), resumable_folder(out, {"a": 1}, overwrite=False) as folder:
        (folder / "shard").write_text("done")
        (folder / WORK / "record").write_text("1")
        raise error
    assert not out.exists()
    with resumable_folder(out, {"a": 1}, overwrite=False) as folder:
        assert (folder / "shard").read_text() == "done"
        assert (folder / WORK / "record").read_text() == "1"
    assert [path.name for path in out.iterdir()] == ["shard"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_request_starts_over(tmp_path: Path) -> None:
    with pytest.raises(OSError), resumable_folder(tmp_path / "out", {"a": 1}, overwrite=False) as folder:
        (folder / "shard").write_text("done")
        raise OSError
    with resumable_folder(tmp_path / "out", {"a": 2}, overwrite=False) as folder:
        assert not (folder / "shard").exists()
        assert not (folder / WORK / "record").exists()


def test_a_request_that_cannot_succeed_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SppError), resumable_folder(tmp_path / "out", {}, overwrite=False) as folder:
        (folder / "shard").touch()
        raise SppError("NaN")
    assert list(tmp_path.iterdir()) == []
