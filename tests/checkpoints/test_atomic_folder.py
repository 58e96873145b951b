"""Output folders: whole or absent, claimed by one process, resumed where they can be."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from spp.checkpoints.atomic_folder import (
    check_output,
    new_folder,
    partial_folder,
    resumable_folder,
    work_folder,
)
from spp.checkpoints.json_files import read_json, write_json
from spp.checkpoints.request import Request
from spp.errors import SppError, UsageError

ASKED = Request({"a": 1})


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
    for target in (tmp_path / "nowhere", model):
        (link := tmp_path / f"link-to-{target.name}").symlink_to(target)
        with pytest.raises(UsageError, match="is a link to .*; name that folder itself"):
            check_output(link, overwrite=True)


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
            resumable_folder(tmp_path / "out", ASKED, overwrite=True),
        ):
            with pytest.raises(UsageError, match="another process is writing"), make:
                pass
        process.kill()
    with new_folder(tmp_path / "out", overwrite=False) as folder:  # the claim ended with the process
        (folder / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def begin(out: Path, request: Request = ASKED, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Work on a resumable folder that is stopped after its first part."""
    with pytest.raises(error), resumable_folder(out, request, overwrite=False) as (folder, work):
        (folder / "shard").write_text("done")
        write_json(work / "record.json", 1)
        raise error


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, MemoryError])
def test_a_resumable_folder_goes_on_after_what_is_no_fault_of_the_request(tmp_path: Path, error: type) -> None:
    out = tmp_path / "out"
    begin(out, error=error)
    assert not out.exists()
    with resumable_folder(out, ASKED, overwrite=False) as (folder, work):
        assert (folder / "shard").read_text() == "done"
        assert read_json(work / "record.json") == 1
    assert [path.name for path in out.iterdir()] == ["shard"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (Request({"a": 2}), "a was 1 and is 2 now"),
        (Request({"a": 1}, {"training data": "1f"}), "training data changed"),
        (Request({"a": 1}, {}, {"spp": "9.9"}), "spp was None and is 9.9 now"),
    ],
)
def test_work_of_another_request_is_kept_until_the_user_lets_it_go(tmp_path: Path, other: Request, named: str) -> None:
    out = tmp_path / "out"
    begin(out)
    with pytest.raises(UsageError, match=rf"{named}.*--overwrite"), resumable_folder(out, other, overwrite=False):
        pass
    with resumable_folder(out, ASKED, overwrite=False) as (folder, _):
        assert (folder / "shard").exists()
    begin(tmp_path / "other")
    with resumable_folder(tmp_path / "other", other, overwrite=True) as (folder, work):
        assert not (folder / "shard").exists() and not (work / "record.json").exists()


def test_work_that_came_nowhere_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), resumable_folder(tmp_path / "out", ASKED, overwrite=False):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_work_that_cannot_even_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("spp.checkpoints.request.write_json", full)
    with pytest.raises(OSError, match="No space"), resumable_folder(tmp_path / "out", ASKED, overwrite=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_request_that_cannot_succeed_leaves_nothing(tmp_path: Path) -> None:
    begin(tmp_path / "out", error=SppError)
    assert list(tmp_path.iterdir()) == []


def test_work_whose_output_was_deleted_starts_over(tmp_path: Path) -> None:
    """Its records speak of files that are not there any more."""
    begin(tmp_path / "out")
    shutil.rmtree(partial_folder(tmp_path / "out"))
    with resumable_folder(tmp_path / "out", ASKED, overwrite=False) as (folder, work):
        assert not (folder / "shard").exists() and not (work / "record.json").exists()


@pytest.fixture
def untidied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that was published just before its process was killed."""

    def killed(work: Path, partial: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("spp.checkpoints.atomic_folder._tidy", killed)
        begin(tmp_path / "out")
        with pytest.raises(KeyboardInterrupt), resumable_folder(tmp_path / "out", ASKED, overwrite=False):
            pass
    assert (tmp_path / "out").is_dir() and work_folder(tmp_path / "out").is_dir()
    return tmp_path / "out"


def test_a_kill_after_publishing_is_tidied_up_by_the_same_request(untidied: Path) -> None:
    check_output(untidied, overwrite=False)
    with resumable_folder(untidied, ASKED, overwrite=False) as (folder, work):
        assert (folder / "shard").exists() and (work / "record.json").exists()
    assert [path.name for path in untidied.parent.iterdir()] == ["out"]


def test_a_kill_at_any_step_of_tidying_up_leaves_work_to_repeat_or_none_at_all(tmp_path: Path) -> None:
    for number in count(1):
        out = tmp_path / f"{number}" / "out"
        begin(out)
        finishing = resumable_folder(out, ASKED, overwrite=False)
        with dying_at_change(number) as changes, suppress(KeyboardInterrupt), finishing:
            pass
        if work_folder(out).exists():
            with resumable_folder(out, ASKED, overwrite=False):
                pass
        assert not work_folder(out).exists() and (out / "shard").read_text() == "done"
        if len(changes) < number:
            break
    assert number > 3


@contextmanager
def dying_at_change(number: int) -> Iterator[list[Path]]:
    """Context manager in which change `number` of a file or folder, and every later one, does not happen any more."""
    changes: list[Path] = []

    def dies(change: Any) -> Any:
        def changed(path: Path, *args: Any, **named: Any) -> Any:
            if not Path(path).name.endswith(".lock"):  # which ends with a process
                changes.append(Path(path))
                if len(changes) >= number:
                    raise KeyboardInterrupt
            return change(path, *args, **named)

        return changed

    with (
        patch.object(Path, "unlink", dies(Path.unlink)),
        patch.object(Path, "rename", dies(Path.rename)),
        patch.object(Path, "rmdir", dies(Path.rmdir)),
        patch.object(shutil, "rmtree", dies(shutil.rmtree)),
    ):
        yield changes


def test_a_kill_after_publishing_costs_no_other_request_the_result(untidied: Path) -> None:
    with pytest.raises(UsageError, match="not empty"), resumable_folder(untidied, Request({}), overwrite=False):
        pass
    assert (untidied / "shard").exists()
    assert [path.name for path in untidied.parent.iterdir()] == ["out"]


def test_a_folder_that_took_the_place_of_a_published_one_is_not_taken_for_it(untidied: Path) -> None:
    untidied.rename(untidied.with_name("moved"))
    untidied.mkdir()
    (untidied / "mine").touch()
    with pytest.raises(UsageError, match="not empty"), resumable_folder(untidied, ASKED, overwrite=False):
        pass
    assert (untidied / "mine").exists()
