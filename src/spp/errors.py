"""Errors that a user can fix: one clear message, no traceback, a fixed exit code."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from reprlib import Repr
from typing import Any, ParamSpec, TypeVar

_LONGEST_LINE = 400  # characters that are quoted of a library's message
_LONGEST_WORD = 1000  # a path may have some hundred
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD},}}")

P = ParamSpec("P")
T = TypeVar("T")


class SppError(Exception):
    """The work could not be done (exit code 1): a broken file, an adapter for another model, a failed proof."""

    exit_code = 1


class UsageError(SppError):
    """The request itself is wrong (exit code 2): a missing path, a malformed pattern, a full output folder."""

    exit_code = 2


def raise_problems(problems: Sequence[str], kind: type[SppError] = UsageError) -> None:
    """Raise one error of class `kind` that lists every problem; do nothing if there is none."""
    if len(problems) == 1:
        raise kind(problems[0])
    if problems:
        raise kind(f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems))


class Problems:
    """Collects what goes wrong in several pieces of work, so that a user sees all of it at once."""

    def __init__(self) -> None:
        self._errors: list[SppError] = []

    def of(self, work: Callable[P, T], *values: P.args, **named: P.kwargs) -> T | None:
        """What `work` returns, or None where it raises a SppError."""
        try:
            return work(*values, **named)
        except SppError as error:
            self._errors.append(error)
            return None

    def raise_any(self) -> None:
        """Raise one error that lists all of them: a UsageError where one of them is."""
        wrong = any(isinstance(error, UsageError) for error in self._errors)
        raise_problems([str(error) for error in self._errors], UsageError if wrong else SppError)


def brief(error: BaseException) -> str:
    """A library's error in one line: the first line of its message, and the second if the first ends in a colon."""
    text = repr(error) if isinstance(error, KeyError) else str(error)  # a bare key explains nothing
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return _cut(line, _LONGEST_LINE)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def readable(message: str) -> str:
    """A message in which words of more than 1000 characters, such as a value that a user pasted, are cut."""
    return _LONG_WORD.sub(lambda word: _cut(word[0], _LONGEST_WORD), message)


_LONGEST = 60
_PARTS = Repr()
_PARTS.maxstring = _PARTS.maxother = _PARTS.maxlong = 2 * _LONGEST  # the message is cut once more, at its end


def shown(value: Any) -> str:
    """A value as an error message shows it; a long or deep one is cut, before it is written out."""
    try:
        text = _PARTS.repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes
        text = f"a very long {type(value).__name__}"
    return _cut(text, _LONGEST)
