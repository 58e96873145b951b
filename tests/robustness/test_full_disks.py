"""Every command that writes, where no file can grow beyond some size: one line that names the path, and no rubbish."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from whole_inputs import WRITING, Case, results

SIZES = 10
_RESUMES = ("prune", "train", "merge", "run")


@contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    """Context manager in which no file may grow beyond `count` bytes: what a full disk is to whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_disk(stock: Path, words: str, folder: Path, size: int, expected: dict[str, bytes]) -> list[str]:
    """What is wrong with what a command does on a disk of that size, and with what it does afterwards."""
    case = Case(stock, words, folder)
    with files_of_at_most(size):
        outcome = case.run(f"files of at most {size} bytes")
    wrong = list(outcome.wrong)
    if outcome.code == 1:
        message = outcome.stderr.rpartition("error: ")[2]
        if str(case.folder) not in message:
            wrong.append("the message names no path")
        left = {path.name for path in set(case.folder.iterdir()) - case.before}
        allowed = {".out.partial", ".out.work"} | ({"out"} if case.words[0] == "run" else set())
        if case.words[0] in _RESUMES:
            wrong = [one for one in wrong if not one.startswith("left")]
        if left - (allowed if case.words[0] in _RESUMES else set()):
            wrong.append(f"left {sorted(left)}")
    elif outcome.code != 0:
        wrong.append(f"exit code {outcome.code}")
    if outcome.code:
        again = case.run("room again")
        if again.code != 0:
            wrong.append(f"with room again: {again}")
    found = results(case)
    if different := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
        wrong.append(f"{different} differ")
    return [f"{outcome}: {wrong}"] if wrong else []


def sizes_of(expected: dict[str, bytes], chance: random.Random, count: int) -> list[int]:
    """Sizes that at least one file does not fit in."""
    largest = max(map(len, expected.values()))
    return [chance.randrange(largest) for _ in range(count)]


def problems(stock: Path, words: str, folder: Path, count: int) -> list[str]:
    whole = Case(stock, words, folder / "whole")
    with patch.object(os, "fsync"):
        assert whole.run("none").code == 0
        expected, chance = results(whole), random.Random(words)
        sizes = sizes_of(expected, chance, count)
        return [one for size in sizes for one in full_disk(stock, words, folder / f"{size}", size, expected)]


@pytest.mark.slow
@pytest.mark.parametrize("words", WRITING)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on_when_there_is_room(
    words: str, stock: Path, tmp_path: Path
) -> None:
    assert problems(stock, words, tmp_path, SIZES) == []


@pytest.mark.parametrize("words", [WRITING[1], "pack {merged} {out}", "convert {adapter} {out}"])
def test_a_full_disk_is_one_line(words: str, stock: Path, tmp_path: Path) -> None:
    assert problems(stock, words, tmp_path, 2) == []
