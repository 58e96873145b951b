"""Small files, JSON mostly, that appear whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from spp.errors import SppError, UsageError


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UsageError: there is no such file.
        SppError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # malformed JSON, malformed UTF-8, and brackets without end
        raise SppError(f"{path}: not valid JSON ({error})") from error


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
    """Write UTF-8 text beside `path` and rename it into place."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


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
