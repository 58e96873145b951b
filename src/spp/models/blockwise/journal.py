"""The progress of passes over a model's blocks, so that a killed run resumes after its last finished block."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any, Self

from spp.checkpoints.json_files import sync_folder
from spp.checkpoints.unfinished import read_record, write_record
from spp.models.blockwise.hidden_states import FolderStates, States, StatesWriter
from spp.runtime import distributed


class Journal(ABC):
    """Progress of passes over the blocks: results of the finished blocks, and the input states of the next one."""

    @abstractmethod
    def results(self, walk: str) -> list[Any]:
        """The results of the blocks that the pass called `walk` has finished, JSON values."""

    @abstractmethod
    def states(self, walk: str, block: int, stream: str = "main") -> States:
        """The hidden states that enter a block in that pass, which may have several streams of them."""

    @abstractmethod
    def finish(self, walk: str, result: Any) -> None:
        """Note the next block as finished; what enters the one after it is complete."""


class FolderJournal(Journal):
    """A journal in a folder that all processes can read; the first of them writes the record.

    A block is finished when its record is renamed into place; everything that it refers to is on disk by then.
    A context manager: after it, nothing writes to the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._record = folder / "record.json"
        self._writer = StatesWriter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def results(self, walk: str) -> list[Any]:
        return self._read().get(walk, [])

    def states(self, walk: str, block: int, stream: str = "main") -> States:
        return FolderStates(self._states(walk, block) / stream, self._writer)

    def finish(self, walk: str, result: Any) -> None:
        record = self._read()
        done = record.get(walk, [])
        self._writer.wait()
        if (following := self._states(walk, len(done) + 1)).is_dir():
            sync_folder(following)
        distributed.barrier()
        if distributed.rank() == 0:
            write_record(self._record, {**record, walk: [*done, result]})
            used = self._states(walk, len(done))
            self._writer.later(used, partial(shutil.rmtree, used, ignore_errors=True))
        distributed.barrier()

    def _read(self) -> dict[str, list[Any]]:
        return read_record(self._record) if self._record.is_file() else {}

    def _states(self, walk: str, block: int) -> Path:
        return self._folder / f"{walk}-{block}"
