"""A process that runs one command, and is killed at a chosen change of the file system, or after a chosen time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
"""Names of Python's audit events; each is raised just before the change."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Moment:
    """When a process is killed: at its change number `change`, from 1, or after `seconds`."""

    change: int | None = None
    seconds: float | None = None


NEVER = Moment()


def processes() -> ForkServerContext:
    """Makes processes that have imported everything, so that they are killed at work, and not while they start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["spp.pipeline.run", "spp.training.teacher_cache", "spp.pruning.pack", "spp.cli.printing", "killed_process"]
    )
    return context


def run_until(context: ForkServerContext, words: list[str], folder: Path, moment: Moment = NEVER) -> int | None:
    """Run a command in a folder; its exit code, or None if it was killed."""
    process = context.Process(target=_work, args=(words, folder, moment.change))
    process.start()
    process.join(moment.seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    return None if process.exitcode == -signal.SIGKILL else process.exitcode


PRINTED, CHANGES, CACHE = "printed", "changes", "cache"
"""What a process leaves in its folder beside its results."""


def _work(words: list[str], folder: Path, last: int | None) -> None:
    os.environ.update(SPP_CACHE=str(folder / CACHE), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    os.chdir(folder)
    printed = os.open(PRINTED, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    import torch

    from spp.cli.entry_point import main

    torch.set_num_threads(1)
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in _CHANGES or (event == "open" and arguments[2] & _WRITES):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    code = main(words)
    Path(CHANGES).write_text(str(count))
    raise SystemExit(code)
