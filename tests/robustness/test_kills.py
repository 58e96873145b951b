"""`kill -9` at random moments of every command that writes: the same command again reaches the same bits."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest
from killed_process import CHANGES, NEVER, PRINTED, Moment, processes, run_until
from whole_inputs import WRITING, Case, results

MOMENTS = 100
RUN = "run --model {dense} --train {stories.jsonl} --eval {stories.txt} --out {out}"
REPORT = "report {run} --out {out}.html"


@pytest.fixture
def killed(stock: Path, tmp_path: Path) -> Killed:
    """Cases whose commands are killed."""
    return Killed(stock, tmp_path)


class Killed:
    """Makes cases, runs their commands until they are killed, and knows what a whole command writes."""

    def __init__(self, stock: Path, folder: Path) -> None:
        self._stock, self._folder, self._numbers, self._context = stock, folder, itertools.count(), processes()

    def case(self, words: str) -> Case:
        """The command in a folder of its own."""
        return Case(self._stock, words, self._folder / f"{next(self._numbers)}")

    def run(self, one: Case, moment: Moment = NEVER) -> int | None:
        """Run it; its exit code, or None if it was killed. It may say that its output is there, and nothing else."""
        code = run_until(self._context, one.words, one.folder, moment)
        if code not in (None, 0):
            said = (one.folder / PRINTED).read_text()
            assert any(words in said for words in ("is not empty", "exists; name another")), said
        return code

    def whole(self, words: str) -> tuple[dict[str, bytes], int, float]:
        """What the command writes, its changes of the file system, and its seconds."""
        began, one = time.perf_counter(), self.case(words)
        assert self.run(one) == 0
        return results(one), int((one.folder / CHANGES).read_text()), time.perf_counter() - began


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("words", WRITING)
def test_a_command_killed_at_random_moments_reaches_the_same_bits(words: str, killed: Killed) -> None:
    killed.whole(words)  # imports what is left
    expected, changes, seconds = killed.whole(words)
    chance, count = random.Random(words), 0
    for number in range(-(-MOMENTS // len(WRITING))):
        one = killed.case(words)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):  # the first time, and while it resumes
            moment = (
                Moment(change=chance.randint(1, changes)) if number % 2 else Moment(seconds=chance.uniform(0, seconds))
            )
            if killed.run(one, moment) is not None:
                break
            count += 1
        killed.run(one)
        assert results(one) == expected
    assert count


@pytest.mark.parametrize(
    ("words", "moments"),
    [
        ("convert {adapter} {out}", range(-4, 0)),
        ("merge {pruned} {adapter} {out}", range(-7, 0)),
        (RUN, range(4, 7)),
        (REPORT, range(-2, 0)),
    ],
)
def test_a_command_killed_at_its_first_or_last_changes_leaves_nothing(
    words: str, moments: range, killed: Killed
) -> None:
    expected, changes, _ = killed.whole(words)
    for number in moments:
        one = killed.case(words)
        assert killed.run(one, Moment(change=number % (changes + 1))) is None
        killed.run(one)
        assert results(one) == expected, number
