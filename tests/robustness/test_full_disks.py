"""Every command that writes, where no file can grow beyond some size: one line that names the path, and no rubbish."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from full_disk import files_of_at_most
from whole_inputs import WRITING, Case, results

SIZES = 10


def problems(stock: Path, words: str, folder: Path, count: int) -> list[str]:
    """What is wrong with what a command does on full disks, of `count` sizes that its largest file does not fit in."""
    whole = Case(stock, words, folder / "whole")
    with patch.object(os, "fsync"):
        assert whole.run("none").code == 0
        expected, chance = results(whole), random.Random(words)
        sizes = [chance.randrange(max(map(len, expected.values()))) for _ in range(count)]
        return [one for size in sizes for one in _problems(Case(stock, words, folder / f"{size}"), size, expected)]


def _problems(case: Case, size: int, expected: dict[str, bytes]) -> Iterator[str]:
    with files_of_at_most(size):
        full = case.run(f"files of at most {size} bytes")
    yield from (f"{full}: {one}" for one in full.wrong if not (one.startswith("it leaves") and _can_resume(case)))
    if full.code not in (0, 1):
        yield f"{full}: exit code"
    if full.code == 1 and str(case.folder) not in full.stderr.rpartition("error: ")[2]:
        yield f"{full}: the message names no path"
    if full.code != 0 and (again := case.run("room again")).code != 0:
        yield f"{again}: it does not go on"
    if results(case) != expected:
        yield f"{full}: another result"


def _can_resume(case: Case) -> bool:
    """Whether what is left is work with a record of progress, or a run with its request."""
    work = case.out.with_name(".out.work")
    records = [path for path in work.rglob("*.json") if path.name not in ("request.json", "folder.json")]
    return bool(records) or (case.out / "run.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("words", WRITING)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on_when_there_is_room(
    words: str, stock: Path, tmp_path: Path
) -> None:
    assert problems(stock, words, tmp_path, SIZES) == []


@pytest.mark.parametrize("words", [WRITING[1], "pack {merged} {out}", "convert {adapter} {out}"])
def test_a_full_disk_is_one_line(words: str, stock: Path, tmp_path: Path) -> None:
    assert problems(stock, words, tmp_path, 2) == []
