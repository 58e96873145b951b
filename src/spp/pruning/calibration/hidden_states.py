"""Storage for the hidden states between two blocks: one tensor for each batch of calibration windows."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spp.checkpoints.json_files import sync

_KEY = "hidden"
_THREADS, _MOST_WAITING = 4, 8


class States(Protocol):
    """Hidden states (windows, tokens, features) by batch number."""

    def __getitem__(self, batch: int, /) -> Tensor:
        """The states of one batch; do not change them in place."""
        ...

    def __setitem__(self, batch: int, hidden: Tensor, /) -> None:
        """Store the states of one batch."""
        ...


class StatesWriter:
    """Writes and deletes files of states; states from a GPU are written while it continues computing."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS)
        self._waiting: dict[Path, Future[None]] = {}

    def write(self, hidden: Tensor, path: Path) -> None:
        """Write states, now or until `wait` returns."""
        if not hidden.is_cuda:
            _save(hidden.cpu(), path)
            return
        if len(self._waiting) >= _MOST_WAITING:
            self.wait_for(next(iter(self._waiting)))
        copy = hidden.to("cpu", non_blocking=True)  # to pinned memory, once the GPU has come to it
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(hidden.device))
        self.later(path, partial(_save_later, copied, copy, path))

    def later(self, path: Path, work: Callable[[], None]) -> None:
        """Do something with a path while other work goes on."""
        self._waiting[path] = self._threads.submit(work)

    def wait_for(self, path: Path) -> None:
        """Wait until all work on a path is done; its errors are raised here."""
        if work := self._waiting.pop(path, None):
            work.result()

    def wait(self) -> None:
        """Wait until all work is done, as `wait_for`."""
        for path in list(self._waiting):
            self.wait_for(path)

    def close(self) -> None:
        """Wait until all work is done, ignoring errors; nothing can be written afterwards."""
        self._threads.shutdown()


def _save(hidden: Tensor, path: Path) -> None:
    save_file({_KEY: hidden.contiguous()}, path)


def _save_later(copied: torch.cuda.Event, hidden: Tensor, path: Path) -> None:
    copied.synchronize()
    _save(hidden, path)
    sync(path)  # here, because it takes as long as writing


class FolderStates:
    """States on disk, one file per batch, so that few batches are in memory, and a killed run can resume.

    Args:
        folder: created if it does not exist.
        writer: shared by all `FolderStates`.
    """

    def __init__(self, folder: Path, writer: StatesWriter) -> None:
        self._folder, self._writer = folder, writer
        folder.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, batch: int) -> Tensor:
        path = self._path(batch)
        self._writer.wait_for(path)
        return load_file(path)[_KEY]

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        self._writer.write(hidden, self._path(batch))

    def _path(self, batch: int) -> Path:
        return self._folder / f"{batch:06}.safetensors"
