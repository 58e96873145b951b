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


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("words", WRITING)
def test_a_command_killed_at_random_moments_reaches_the_same_bits(words: str, stock: Path, tmp_path: Path) -> None:
    context, numbers = processes(), itertools.count()

    def case() -> Case:
        return Case(stock, words, tmp_path / f"{next(numbers)}")

    def run(one: Case, moment: Moment = NEVER) -> int | None:
        code = run_until(context, one.words, one.folder, moment)
        assert code in (None, 0), (one.folder / PRINTED).read_text()
        return code

    run(case())  # imports what is left
    began, whole = time.perf_counter(), case()
    assert run(whole) == 0
    seconds, changes = time.perf_counter() - began, int((whole.folder / CHANGES).read_text())
    expected, chance, killed = results(whole), random.Random(words), 0
    for number in range(-(-MOMENTS // len(WRITING))):
        one = case()
        for _ in range(chance.choice((1, 1, 1, 2, 3))):  # the first time, and while it resumes
            moment = (
                Moment(change=chance.randint(1, changes)) if number % 2 else Moment(seconds=chance.uniform(0, seconds))
            )
            if run(one, moment) == 0 or is_finished(one, expected):
                break
            killed += 1
        if not is_finished(one, expected):
            assert run(one) == 0
        assert is_finished(one, expected)
    assert killed


def is_finished(case: Case, expected: dict[str, bytes]) -> bool:
    """Whether everything is there, and nothing else but what a process leaves that is killed when all is done."""
    rest = {".out.lock", ".out.html.lock", ".out.partial/request.json", ".out.partial/folder.json"}
    return {name: content for name, content in results(case).items() if name not in rest} == expected
