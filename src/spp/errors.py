"""Errors that are the user's to fix: one clear message, no traceback, a fixed exit code."""

from __future__ import annotations

from collections.abc import Sequence


class SppError(Exception):
    """The work could not be done (exit code 1): a broken file, an adapter for another model, a failed proof."""

    exit_code = 1


class UsageError(SppError):
    """The request itself is wrong (exit code 2): a missing path, a malformed pattern, a full output folder."""

    exit_code = 2


def raise_problems(problems: Sequence[str], kind: type[SppError] = UsageError) -> None:
    """Raise one `kind` that lists every problem; return where there is none."""
    if len(problems) == 1:
        raise kind(problems[0])
    if problems:
        raise kind(f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems))


def brief(error: BaseException) -> str:
    """What a library's error says, in one line: its first line, and the next where that one only announces it."""
    text = repr(error) if isinstance(error, KeyError) else str(error)  # a bare key explains nothing
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
