"""Files and names that others made: what goes wrong while one is read or written becomes one clear error."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spp.errors import SppError, UsageError, brief, shown

_OS_ERROR = re.compile(r"os error (\d+)")  # how Rust's libraries end the message of an error of the system
_TORCH_CANNOT_WRITE = ("inline_container", "PytorchStreamWriter", "file write failed", "iostream error")
_NO_ROOM = 2**20  # bytes that are free where a library was stopped by a full disk, at most


def user_path(text: str | Path) -> Path:
    """A path as a user writes it: `~` and `~name` are home folders.

    Raises:
        UsageError: there is no such user, or the name is no text.
    """
    if problem := not_text(str(text)):
        raise UsageError(f"{shown(str(text))}: {problem}")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = str(text).split("/", 1)[0]
        raise UsageError(
            f"{text}: there is no user {user.removeprefix('~')!r} with a home folder; write it out"
        ) from None


def not_text(text: str) -> str | None:
    """Why a string cannot be written as UTF-8 text or a file's name, as a phrase; None if it can."""
    if "\0" in text:
        return "it holds a NUL character; remove it"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start + 1} is not UTF-8 (half of a surrogate pair); rename it, or write it in UTF-8"
    return None


@contextmanager
def reading(
    path: Path, expected: str, remedy: str = "it is truncated or damaged: copy or download it again"
) -> Iterator[None]:
    """Context manager that turns every error of a parser or a library, while `path` is read, into one of ours.

    Args:
        path: the file.
        expected: what it should be, for the message: `valid JSON`.
        remedy: what to do, if it is not.

    Raises:
        UsageError: there is no such file, it may not be read, or it is a folder, a pipe or a device.
        SppError: whatever else goes wrong.
    """
    try:
        _require_readable(path)
        yield
    except (SppError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except PermissionError as error:
        raise UsageError(
            f"{path}: it is there, but may not be read ({error.strerror}); change its permissions"
        ) from error
    except OSError as error:
        raise SppError(f"{path}: cannot be read ({error.strerror or brief(error)})") from error
    except BaseException as error:  # a panic of a library in Rust is no Exception
        raise SppError(f"{path}: not {expected} ({brief(error)}); {remedy}") from error


def _require_readable(path: Path) -> None:
    """Refuse what blocks when it is opened, and find out what libraries hide: that a file may not be read."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise UsageError(f"{path} is a folder, and a file is expected")
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is a pipe or a device, and a file is expected; copy its content to a file")
    path.open("rb").close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager that turns every error of writing `path`, by any library, into an OSError that names it.

    It stays an OSError, because work may go on once there is room; a SppError says that it would fail again.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and error.errno is not None:
            raise
        raise _named(error.errno or errno.EIO, path) from error
    except SppError:
        raise
    except Exception as error:
        number = _errno_of(error, path)
        if number is None:
            raise
        raise _named(number, path) from error


def _errno_of(error: Exception, path: Path) -> int | None:
    """The number of the system's error that a library wrapped; None if it was no error of writing."""
    if found := _OS_ERROR.search(str(error)):
        return int(found[1])
    inner = error.__cause__ or error.__context__
    if isinstance(inner, OSError) and inner.errno is not None:
        return inner.errno
    if any(words in str(error) for words in _TORCH_CANNOT_WRITE):  # torch.save does not say why
        return errno.ENOSPC if _is_full(path) else errno.EIO
    return None


def _is_full(path: Path) -> bool:
    place = next((folder for folder in (path, *path.parents) if folder.exists()), Path())
    return shutil.disk_usage(place).free < _NO_ROOM


def _named(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or the one that it came from, is that of a full disk or a spent quota."""
    causes = (error, error.__cause__, error.__context__)
    return any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) for one in causes)
