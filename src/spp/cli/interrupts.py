"""Ctrl-C while modules are imported: it ends the process at once, when there is nothing to tidy up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 + SIGINT, as shells have it."""

_MESSAGE = "error: interrupted while starting up; nothing was done\n"


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Context manager in which Ctrl-C ends the process: an exception would run into the middle of an import.

    Libraries turn it into errors of their own there, and C extensions that are half imported crash.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, _MESSAGE.encode())
    os._exit(INTERRUPTED)
