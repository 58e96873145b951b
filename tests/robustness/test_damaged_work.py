"""Damaged unfinished work of a killed command: the same bits, or one clear error after which it starts over."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import damage
import pytest
from whole_inputs import Case, results

import spp.adapters.merge as merge_stage
from spp.adapters.merge_record import MergeRecord
from spp.models.blockwise.journal import FolderJournal
from spp.training.checkpoints import Checkpoints

_TRAIN = "train {pruned} {out} --data {stories.jsonl} --max-steps 4 --save-steps 1"
KILLED = {
    "prune {dense} {out} --calibration {stories.jsonl} --samples 4 --window 32": (FolderJournal, "finish", 2),
    "prune {sharded} {out} --pattern 50% --allocation owl --calibration {stories.txt}": (FolderJournal, "finish", 4),
    f"{_TRAIN} --validation 4": (Checkpoints, "on_save", 3),
    f"{_TRAIN} --method full": (Checkpoints, "on_save", 3),
    "pack {pruned} {out} --bits 3 --calibration {stories.jsonl} --samples 4 --window 32": (FolderJournal, "finish", 2),
    "merge {pruned-sharded} {adapter-sharded} {out}": (MergeRecord, "save", 4),
}
"""Words of a command -> the function that it does not return from, and at which call."""


class Unfinished:
    """A command's unfinished work, as often as it is needed, and always in the same place."""

    def __init__(self, case: Case, saved: Path, expected: dict[str, bytes]) -> None:
        self.case, self._saved, self.expected = case, saved, expected

    def again(self) -> list[Path]:
        """Lay it out anew; returns its files."""
        shutil.rmtree(self.case.folder)
        shutil.copytree(self._saved, self.case.folder)
        new = (self.case.out.with_name(name) for name in (".out.work", ".out.partial"))
        return sorted(path for folder in new for path in folder.rglob("*") if path.is_file())


@pytest.fixture(params=KILLED)
def unfinished(request: pytest.FixtureRequest, stock: Path, tmp_path: Path) -> Unfinished:
    """That of each command."""
    whole = Case(stock, request.param, tmp_path / "whole")
    assert whole.run("none").code == 0
    case = Case(stock, request.param, tmp_path / "case")
    owner, name, last = KILLED[request.param]
    real, calls = getattr(owner, name), 0

    def counted(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    with patch.object(owner, name, counted), patch.object(merge_stage, "_AT_ONCE", 1):
        assert case.run("a kill").code == 130
    shutil.copytree(case.folder, tmp_path / "saved")
    return Unfinished(case, tmp_path / "saved", results(whole))


@pytest.mark.parametrize("numbers", [range(3), pytest.param(range(10, 60), marks=pytest.mark.slow)])
def test_damaged_unfinished_work_is_noticed(numbers: range, unfinished: Unfinished) -> None:
    assert [problem for number in numbers for problem in _problems(unfinished, random.Random(number))] == []


def _problems(unfinished: Unfinished, chance: random.Random) -> Iterator[str]:
    path = chance.choice(unfinished.again())
    case = unfinished.case
    outcome = case.run(f"{path.relative_to(case.folder)}: {_damaged(path, chance)}")
    yield from (f"{outcome}: {one}" for one in outcome.wrong if not one.startswith("it leaves"))
    if outcome.code == 0 and results(case) != unfinished.expected:
        yield f"{outcome}: other bits"
    elif outcome.code != 0:  # the work is gone, or that of another request, as far as the command can see
        case.words += (more := ["--overwrite"] if outcome.code == 2 else [])
        again = case.run(f"{outcome}, then again")
        case.words = case.words[: len(case.words) - len(more)]
        if again.code != 0 or results(case) != unfinished.expected:
            yield f"{again}: it does not start over"


def _damaged(path: Path, chance: random.Random) -> str:
    """Damage a file; of hidden states, only what a truncated or lost file may be is promised to be noticed."""
    if path.parent.name != "main":
        return damage.file(path, chance)
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])
    return "cut"
