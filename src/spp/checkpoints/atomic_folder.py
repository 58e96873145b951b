"""Output folders that appear whole or not at all, and small files in them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spp.checkpoints.json_files import read_json, sync, sync_folder, write_json
from spp.checkpoints.lock import locked
from spp.checkpoints.request import Request
from spp.errors import SppError, UsageError

logger = logging.getLogger("spp")

_REQUEST = "request.json"
_FOLDER = "folder.json"
"""The inode of the folder in the making, which it keeps when it is published."""


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
    if out.is_dir() and any(out.iterdir()) and not overwrite and not _is_untidied(out):
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
    partial = partial_folder(out)
    with locked(out):
        _make_empty(partial)  # what a killed run left behind is never a finished result
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
    """As `new_folder`, but unfinished work is kept, and gone on with by the next call with the same `request`.

    Yields the hidden sibling that becomes `out`, and another one (`work_folder`) for what the work needs to go on:
    records as JSON files, and whatever they speak of. The second one is deleted once `out` is there.

    Args:
        out: the folder to make.
        request: everything that the result depends on.
        overwrite: whether `out`, and the unfinished work of another request, may be replaced.
        keep_after_failure: whether work is kept after a SppError, too; by default it goes, as the error would come
            again.

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
            _make_empty(partial)
            _make_empty(work)
            write_json(work / _FOLDER, partial.stat().st_ino)
            request.write(work / _REQUEST)
        elif _is_untidied(out):
            out.rename(partial)  # killed between the last two steps: both are done once more
        try:
            yield partial, work
            _publish(partial, out)
            _tidy(work)
        except BaseException as error:
            if not _begun(work) or (isinstance(error, SppError) and not keep_after_failure):
                shutil.rmtree(partial, ignore_errors=True)
                shutil.rmtree(work, ignore_errors=True)
            raise


def _can_go_on(work: Path, request: Request, out: Path, overwrite: bool) -> bool:
    """Whether unfinished work is there, and of this request.

    Raises:
        UsageError: it is of another one, has come somewhere, and the user has not said that it may go.
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
            "go on with it, name another output, or pass --overwrite to start over"
        )
    if _begun(work):
        logger.info("%s is of another run (%s); starting over", work, "; ".join(differences))
    return False


def _begun(work: Path) -> bool:
    """Whether there is a record of something done."""
    return any(path.name not in (_REQUEST, _FOLDER) for path in work.rglob("*.json"))


def _is_untidied(out: Path) -> bool:
    """Whether a run was killed after it had published its result, and before it deleted what it needed to make it."""
    try:
        made = read_json(work_folder(out) / _FOLDER)
    except SppError:  # there is nothing, or it was half deleted
        return False
    return not partial_folder(out).exists() and out.is_dir() and out.stat().st_ino == made


def _tidy(work: Path) -> None:
    """Delete what is not needed any more, and last what tells whose it was."""
    for path in sorted(work.iterdir(), key=lambda path: path.name in (_REQUEST, _FOLDER)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    work.rmdir()


def partial_folder(out: Path) -> Path:
    """The hidden sibling in which `out` is made."""
    return out.with_name(f".{out.name}.partial")


def work_folder(out: Path) -> Path:
    """The hidden sibling that has what is needed to go on with `out` after a kill."""
    return out.with_name(f".{out.name}.work")


def _make_empty(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _publish(partial: Path, out: Path) -> None:
    """Rename a finished folder into place; what was there goes once the new one is."""
    sync_folder(partial)
    replaced = out.with_name(f".{out.name}.replaced")
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    partial.rename(out)
    sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)
