"""Output folders that appear whole or not at all, and small files in them."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spp.checkpoints.json_files import read_json, sync, sync_folder, write_json
from spp.errors import SppError, UsageError

WORK = ".work"
"""Folder for what a resumable output needs while it is in the making."""

_LOCK = ".lock"
_REQUEST = "request.json"


def check_output(out: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse, before any work, an output folder that would cost the user something.

    Raises:
        UsageError: `out` is a file, holds something and `overwrite` is off, or is or holds one of `inputs`.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"output {out} is a file; name a folder")
    for source in inputs:
        if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
            raise UsageError(f"output {out} is or holds the input {source}; name another folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UsageError(f"output folder {out} is not empty; name another one, or pass --overwrite to replace it")


def check_output_file(out: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse, before any work, an output file that would cost the user something.

    Raises:
        UsageError: `out` is a folder, exists and `overwrite` is off, or is one of `inputs`.
    """
    if out.is_dir():
        raise UsageError(f"output {out} is a folder; name a file")
    if any(out.resolve() == source.resolve() for source in inputs):
        raise UsageError(f"output {out} is an input; name another file")
    if out.exists() and not overwrite:
        raise UsageError(f"output {out} exists; name another file, or pass --overwrite to replace it")


@contextmanager
def new_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Make `out` whole or not at all: yields a hidden sibling that is synced and renamed when the block succeeds.

    Raises:
        UsageError: see `check_output`; or another process is making `out` right now.
    """
    check_output(out, overwrite)
    with _claimed(out) as partial:
        _clear(partial)  # what a killed run left behind is never a finished result
        try:
            yield partial
            _publish(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def resumable_folder(out: Path, request: dict[str, Any], *, overwrite: bool) -> Iterator[Path]:
    """As `new_folder`, but unfinished work is kept, and found again by the next call with the same `request`.

    It is kept however the block ends but by a SppError, which would only come again. What the work needs to go on
    belongs into the folder `WORK` inside, which is not published.

    Args:
        out: the folder to make.
        request: everything that the result depends on, as JSON values.
        overwrite: whether `out` may be replaced in the end.

    Raises:
        UsageError: see `new_folder`.
    """
    check_output(out, overwrite)
    with _claimed(out) as partial:
        asked = partial / WORK / _REQUEST
        if not asked.is_file() or read_json(asked) != request:
            _clear(partial)
            asked.parent.mkdir()
            write_json(asked, request)
        try:
            yield partial
            shutil.rmtree(partial / WORK)
            _publish(partial, out)
        except SppError:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def partial_folder(out: Path) -> Path:
    """The hidden sibling in which `out` is made."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def _claimed(out: Path) -> Iterator[Path]:
    """The hidden sibling of `out`, which no other process has; the claim ends with the process, however that ends."""
    partial = partial_folder(out)
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial / _LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise UsageError(
            f"another process is writing {out} right now; wait until it has finished, or name another folder"
        ) from None
    try:
        yield partial
    finally:
        os.close(lock)


def _clear(folder: Path) -> None:
    """Delete everything in a claimed folder but the claim."""
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _publish(partial: Path, out: Path) -> None:
    """Rename a finished folder into place; what was there goes once the new one is."""
    (partial / _LOCK).unlink()
    sync_folder(partial)
    replaced = out.with_name(f".{out.name}.replaced")
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    partial.rename(out)
    sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)
