"""Progress on standard error: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield `items`, showing how many are done; `total` is needed where `items` has no length."""
    with _bar(MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        yield from progress.track(items, description=description, total=total)


@contextmanager
def track_bytes(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` bytes are done, and how many a second; yields what adds to them."""
    with _bar(DownloadColumn(), TransferSpeedColumn()) as progress:
        task = progress.add_task(description, total=total, completed=done)
        yield lambda count: progress.advance(task, count)


def _bar(*columns: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    shown = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    return Progress(*shown, console=console, disable=not console.is_terminal, transient=True)
