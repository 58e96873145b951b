"""A lock on an output: a second process that would write to it is refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spp.errors import UsageError


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of an output, a hidden file beside it; it ends with the process, however that ends.

    Raises:
        UsageError: another process holds it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    path = lock_file(out)
    lock = _taken(path, out)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held, so that nobody can hold a file that is about to go
        os.close(lock)


def lock_file(out: Path) -> Path:
    """The hidden sibling of an output that is its lock; a process that was killed leaves it, and holds it no more."""
    return out.with_name(f".{out.name}.lock")


def _taken(path: Path, out: Path) -> int:
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UsageError(
                f"another process is writing {out} right now; wait until it has finished, or name another output"
            ) from None
        except OSError:  # some file systems of clusters have no locks; work is not refused there
            return lock
        if _is_still(path, lock):
            return lock
        os.close(lock)  # its holder deleted the file after we opened it


def _is_still(path: Path, lock: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(lock))
    except FileNotFoundError:
        return False
