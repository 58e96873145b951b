"""Small files, JSON mostly, that appear whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from spp.errors import SppError
from spp.runtime.files import reading, writing

_MOST_DIGITS = 300


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UsageError: there is no such file, or it may not be read.
        SppError: it is not JSON, or holds a number with more digits than any float can have.
    """
    with reading(path, "valid JSON"):
        return json.loads(path.read_text(encoding="utf-8"), parse_int=_integer)


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:  # no float can hold it, so that arithmetic with it would fail somewhere
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UsageError: there is no such file.
        SppError: it is not JSON, or not an object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise SppError(f"{path}: a JSON object is expected, and this is {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside `path` and rename it into place, so that a reader never sees half a file."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text beside `path` and rename it into place.

    Raises:
        OSError: it cannot be written; nothing is left behind, and a file that was there stays.
    """
    partial = partial_file(path)
    try:
        with writing(path):
            partial.write_text(text, encoding="utf-8", errors="replace")  # names in a damaged file may be no text
            sync(partial)
            partial.replace(path)
            sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_file(path: Path) -> Path:
    """The hidden sibling in which a file is written."""
    return path.with_name(f".{path.name}.partial")


def sync_folder(folder: Path) -> None:
    """Make a folder and everything in it survive a crash of the machine."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Make a file or a folder's entries survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
