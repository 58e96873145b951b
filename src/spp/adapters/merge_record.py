"""What a merge has written so far, kept on disk, so that a merge that was killed resumes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from spp.checkpoints.rewrite import Rewriting
from spp.checkpoints.unfinished import read_record, write_record
from spp.ops.zero_proof import TensorProof

logger = logging.getLogger("spp")

FILE = "merged.json"


class MergeRecord:
    """Writes tensors, and records them.

    A context manager: on exit it waits until the last save is on disk.

    Args:
        folder: for the record; if there is one in it, the merge is resumed from it.
        files: the files that the tensors are written to.
        base: SHA-256 of every tensor of the base.

    Attributes:
        done: name of each tensor that is written -> what is known of it, as JSON values: its proof (None if it was
            copied, or is a dense weight that replaces the base's), its SHA-256 (None if that is the base's), and how
            many entries of the base are NaN or infinite.
    """

    def __init__(self, folder: Path, files: Rewriting, base: Mapping[str, str]) -> None:
        self._path, self._files, self._base = folder / FILE, files, base
        self._saver, self._saving = ThreadPoolExecutor(1), finished()
        self.done: dict[str, Any] = read_record(self._path) if self._path.is_file() else {}
        for name, digest in self.digests.items():
            if files.digest(name) != digest:
                logger.warning("%s was damaged after it had been merged; it is merged again", name)
                del self.done[name]

    def write(self, name: str, tensor: Tensor, proof: TensorProof | None, non_finite: int) -> None:
        """Write a new tensor; a dense one that replaces the base's has no proof."""
        self.done[name] = {
            "sha256": self._files.write(name, tensor),
            "proof": None if proof is None else asdict(proof),
            "non_finite": non_finite,
        }

    def copy(self, name: str, non_finite: int) -> None:
        """Copy the base's tensor, byte for byte."""
        self._files.copy(name)
        self.done[name] = {"sha256": None, "proof": None, "non_finite": non_finite}

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every tensor that is written."""
        return {name: one["sha256"] or self._base[name] for name, one in self.done.items()}

    @property
    def proofs(self) -> dict[str, TensorProof]:
        """Those of the tensors that were not copied."""
        return {name: TensorProof(**one["proof"]) for name, one in self.done.items() if one["proof"] is not None}

    def save(self) -> None:
        """In the background, flush the written tensors to disk, then save the record as it is now."""
        self._saving.result()
        self._saving = self._saver.submit(self._save, dict(self.done))

    def _save(self, done: dict[str, Any]) -> None:
        self._files.sync()
        write_record(self._path, done)

    def __enter__(self) -> None:
        """No set-up."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._saver.shutdown()
        if kind is None:
            self._saving.result()


def finished() -> Future[None]:
    """A future that is done."""
    future: Future[None] = Future()
    future.set_result(None)
    return future
