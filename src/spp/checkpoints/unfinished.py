"""Records of unfinished work, from which a killed run goes on; damage to what they describe is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spp.checkpoints.fingerprint import json_digest
from spp.checkpoints.json_files import read_object, write_json
from spp.errors import SppError
from spp.runtime.files import reading


class DamagedWork(SppError):
    """Unfinished work is not what the killed run had written; `resumable_folder` deletes it."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"{problem}. So the unfinished work of a killed run is damaged, and is deleted; repeat the command to "
            "start over"
        )


@contextmanager
def going_on_from(path: Path) -> Iterator[None]:
    """Context manager in which a file of unfinished work is read.

    Raises:
        DamagedWork: whatever goes wrong with it.
    """
    try:
        with reading(path, "as it was written", "it was truncated or damaged"):
            yield
    except SppError as error:
        raise DamagedWork(str(error)) from error


def write_record(path: Path, content: Any) -> None:
    """Write JSON, with its own digest."""
    write_json(path, {"content": content, "sha256": json_digest(content)})


def read_record(path: Path) -> Any:
    """Read what `write_record` wrote.

    Raises:
        DamagedWork: it is missing, or anything in it has changed.
    """
    with going_on_from(path):
        record = read_object(path)
        if record.get("sha256") != json_digest(record.get("content")):
            raise ValueError("its digest is another one")
    return record["content"]
