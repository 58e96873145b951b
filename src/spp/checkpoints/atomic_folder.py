"""Output folders that appear whole or not at all, and small files in them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spp.checkpoints.json_files import read_json, sync, sync_folder, write_json
from spp.checkpoints.lock import lock_file, locked
from spp.checkpoints.request import Request
from spp.checkpoints.unfinished import DamagedWork
from spp.errors import SppError, UsageError

logger = logging.getLogger("spp")

_REQUEST = "request.json"
_FOLDER = "folder.json"
"""File with the inode of the unfinished folder, which does not change when it is renamed into place."""


def check_output(out: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output folder that must not be written to, before any work is done.

    Raises:
        UsageError: `out` is a file or a link, holds something and `overwrite` is off, or is or holds one of `inputs`.
    """
    if out.is_symlink():  # which cannot be replaced by a folder, and has its temporary neighbours elsewhere
        raise UsageError(f"output {out} is a link to {os.readlink(out)}; name that folder itself")
    if out.exists() and not out.is_dir():
        raise UsageError(f"output {out} is a file; name a folder")
    for source in inputs:
        if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
            raise UsageError(f"output {out} is or holds the input {source}; name another folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite and not _is_untidied(out):
        _sweep(out)
        raise UsageError(f"output folder {out} is not empty; name another one, or pass --overwrite to replace it")


def check_output_file(out: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output file that must not be written to, before any work is done.

    Raises:
        UsageError: `out` is a folder, exists and `overwrite` is off, or is one of `inputs`.
    """
    if out.is_dir():
        raise UsageError(f"output {out} is a folder; name a file")
    if any(out.resolve() == source.resolve() for source in inputs):
        raise UsageError(f"output {out} is an input; name another file")
    if out.exists() and not overwrite:
        _sweep(out)
        raise UsageError(f"output {out} exists; name another file, or pass --overwrite to replace it")


@contextmanager
def new_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Context manager that creates `out` whole or not at all: a hidden sibling folder, renamed on success.

    Raises:
        UsageError: see `check_output`; or another process is making `out` right now.
    """
    check_output(out, overwrite)
    partial = partial_folder(out)
    with locked(out):
        _make_empty(partial)  # a killed run left it; it is never a finished result
        try:
            yield partial
            _publish(partial, out)
            shutil.rmtree(work_folder(out), ignore_errors=True)  # of another command, whose output this was
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def resumable_folder(
    out: Path, request: Request, *, overwrite: bool, keep_after_failure: bool = False
) -> Iterator[tuple[Path, Path]]:
    """As `new_folder`, but unfinished work is kept, and the next call with the same `request` resumes it.

    Yields the hidden sibling folder that becomes `out`, and another one (`work_folder`) for the state that resuming
    needs: records as JSON files, and the files that they refer to. The second one is deleted when `out` is complete.

    Args:
        out: the folder to make.
        request: everything that the result depends on.
        overwrite: whether `out`, and the unfinished work of another request, may be replaced.
        keep_after_failure: whether work is kept after an SppError, too; by default it is deleted, because the error
            would occur again. After DamagedWork it is always deleted.

    Raises:
        UsageError: see `new_folder`; or the unfinished work is another request's, and `overwrite` is off.
    """
    check_output(out, overwrite)
    partial, work = partial_folder(out), work_folder(out)
    with locked(out):
        if not _can_go_on(work, request, out, overwrite):
            if _is_untidied(out):
                shutil.rmtree(work)
                check_output(out, overwrite)
            _begin(partial, work, request)
        elif _is_untidied(out):
            out.rename(partial)  # killed between the last two steps: both are done once more
        try:
            yield partial, work
            _publish(partial, out)
            _tidy(work, partial)
        except BaseException as error:
            again = isinstance(error, DamagedWork) or (isinstance(error, SppError) and not keep_after_failure)
            if again or not _begun(work):
                shutil.rmtree(partial, ignore_errors=True)
                shutil.rmtree(work, ignore_errors=True)
            raise


def _can_go_on(work: Path, request: Request, out: Path, overwrite: bool) -> bool:
    """Whether there is unfinished work of this request.

    Raises:
        UsageError: there is unfinished work of another request, with a record of progress, and `overwrite` is off.
    """
    before = Request.read(work / _REQUEST)
    if before is None or not (partial_folder(out).is_dir() or _is_untidied(out)):
        return False
    differences = before.differences(request)
    if not differences:
        return True
    if _begun(work) and not overwrite and not _is_untidied(out):
        raise UsageError(
            f"{work} holds the unfinished work of another run: {'; '.join(differences)}. Repeat that run as it was to "
            "resume it, name another output, or pass --overwrite to start over"
        )
    if _begun(work):
        logger.info("%s is of another run (%s); starting over", work, "; ".join(differences))
    return False


def _begin(partial: Path, work: Path, request: Request) -> None:
    """Make both folders anew, or none of them."""
    try:
        _make_empty(partial)
        _make_empty(work)
        write_json(work / _FOLDER, partial.stat().st_ino)
        request.write(work / _REQUEST)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
        raise


def _begun(work: Path) -> bool:
    """Whether there is a record of progress."""
    return any(path.name not in (_REQUEST, _FOLDER) for path in work.rglob("*.json"))


def _is_untidied(out: Path) -> bool:
    """Whether a run was killed after `out` was complete, but before its work folder was deleted."""
    try:
        made = read_json(work_folder(out) / _FOLDER)
    except SppError:  # there is nothing, or it was half deleted
        return False
    return not partial_folder(out).exists() and out.is_dir() and out.stat().st_ino == made


def _tidy(work: Path, partial: Path) -> None:
    """Delete the work folder. The files that say what it belongs to go last and at once: till then, a run can go on."""
    for path in work.iterdir():
        if path.name not in (_REQUEST, _FOLDER):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    work.rename(partial)  # a name that is free now, and that the next run sweeps away
    shutil.rmtree(partial)


def _sweep(out: Path) -> None:
    """Delete what was left by a command that was killed when `out` was complete, unless one is at work there."""
    left = [partial_folder(out), _replaced(out)]
    if work_folder(out).exists() or not any(path.exists() for path in (*left, lock_file(out))):
        return
    with suppress(UsageError, OSError), locked(out):  # which deletes its own file
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)


def partial_folder(out: Path) -> Path:
    """The hidden sibling in which `out` is made."""
    return out.with_name(f".{out.name}.partial")


def work_folder(out: Path) -> Path:
    """The hidden sibling folder with the state from which `out` is resumed after a kill."""
    return out.with_name(f".{out.name}.work")


def _replaced(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _make_empty(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _publish(partial: Path, out: Path) -> None:
    """Rename a finished folder into place; an old one is deleted afterwards."""
    sync_folder(partial)
    replaced = _replaced(out)
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    partial.rename(out)
    sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)
