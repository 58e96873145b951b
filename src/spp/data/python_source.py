"""Python's standard library as a corpus that every user already has.

`spp run` without arguments needs text, and there may be no access to a hub. Every Python installation has
several megabytes of documented, reviewed source code, so that is the corpus: one document per file, split by
file. The part that a file belongs to depends on its relative path alone, so no file ever moves to another part
between runs, machines or (where the file keeps its name) Python versions.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

Part = Literal["train", "calibration", "evaluation"]

# Of every 20 files, 1 is for evaluation, 1 for calibration, and 18 for training.
_BUCKETS = 20
_PART_OF_BUCKET: dict[int, Part] = {0: "evaluation", 1: "calibration"}

# Folders of code that was not written to be read: third-party trees, test fixtures, generated tables.
_EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib-dynload"}
)
_SMALLEST_FILE_BYTES = 512


def part_of(relative_path: str) -> Part:
    """The part (`train`, `calibration` or `evaluation`) that a file with this POSIX path belongs to."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return _PART_OF_BUCKET.get(int.from_bytes(digest[:8], "big") % _BUCKETS, "train")


def source_files(root: Path) -> list[Path]:
    """Python files below `root`, sorted, without tests, generated tables, links and near-empty files."""
    return sorted(
        path
        for path in root.rglob("*.py")
        if not _EXCLUDED_FOLDERS.intersection(path.relative_to(root).parts[:-1])
        and not path.is_symlink()
        and path.stat().st_size >= _SMALLEST_FILE_BYTES
    )


def read_source(path: Path) -> str | None:
    """The text of a source file, or None where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def standard_library(part: Part) -> list[str]:
    """One part of the running interpreter's standard library: a list of documents, one per file."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in source_files(root) if part_of(path.relative_to(root).as_posix()) == part]
    return [text for text in map(read_source, files) if text is not None]
