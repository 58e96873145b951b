"""The files of a pruned model: takes finished blocks, writes them, and returns facts about their tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp.checkpoints.checkpoint import Checkpoint
from spp.checkpoints.rewrite import Rewriting
from spp.checkpoints.unfinished import DamagedWork, read_record, write_record
from spp.errors import SppError
from spp.models.weight_map import Part
from spp.ops.dtypes import dtype_name
from spp.ops.zero_proof import lost_zeros
from spp.ops.zeros import all_finite
from spp.patterns import detect_pattern
from spp.runtime.progress import track


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """A pruned tensor as it lies in the file.

    Attributes:
        entries: weights in it.
        zeros: zeros among them.
        zeros_before: zeros before pruning.
        pattern: the pattern that it obeys, if it is sparse; detected only if existing zeros are kept.
        transposed: whether the file holds it as (I, O) instead of (O, I).
    """

    entries: int
    zeros: int
    zeros_before: int
    pattern: str | None
    transposed: bool

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.entries


class PrunedFiles:
    """Takes the tensors of a model in any order, and writes them under the names and in the dtypes that they had.

    Args:
        source: the dense model.
        folder: folder to write to; files of an earlier run are continued.
        work: folder for the record of what is written.
        pruned: names of the parameters that are pruned.
        adopt: whether existing zeros are kept (keep_zeros), so that their pattern is to be detected.

    Raises:
        SppError: there is no room for the files.
        DamagedWork: they are not what the earlier run had written.
    """

    def __init__(self, source: Checkpoint, folder: Path, work: Path, pruned: Collection[str], *, adopt: bool) -> None:
        self._source, self._pruned, self._adopt = source, pruned, adopt
        self._files, self._record = Rewriting(source, folder), work / "written.json"
        self._digests: dict[str, str] = read_record(self._record) if self._record.is_file() else {}
        if changed := [name for name, digest in self._digests.items() if self._files.digest(name) != digest]:
            raise DamagedWork(f"{folder}: {changed[0]} is not as it was written")

    def copy(self, names: Iterable[str]) -> None:
        """Copy tensors unchanged."""
        for name in track(sorted(names), "copying what is not pruned"):
            self._write(name, self._source.tensor(name))
        self._save()

    def keep(self, block: dict[str, tuple[Part, Tensor]]) -> dict[str, Any]:
        """Write the tensors of a finished block; returns the facts of those that were pruned, by name, for JSON.

        Raises:
            SppError: an updated weight is too large for the file's dtype, or a zero was lost.
        """
        facts = {}
        for name, (part, after) in block.items():
            before = self._source.tensor(name)
            if part.parameter in self._pruned:
                after = _in_file_dtype(name, before, after)
                facts[name] = asdict(self._facts(name, before, after))
                self._write(name, after)
            else:
                self._write(name, before)
        self._save()
        return facts

    def _write(self, name: str, tensor: Tensor) -> None:
        self._digests[name] = self._files.write(name, tensor)

    def _save(self) -> None:
        self._files.sync()
        write_record(self._record, self._digests)

    def _facts(self, name: str, before: Tensor, after: Tensor) -> TensorFacts:
        if lost := lost_zeros(before, after):
            raise SppError(f"{name}: {lost} weights that were zero are not any more; this is a bug of spp")
        transposed = self._source.transposed(name)
        pattern = detect_pattern(after.T if transposed else after) if self._adopt else None
        return TensorFacts(
            entries=after.numel(),
            zeros=int((after == 0).count_nonzero()),
            zeros_before=int((before == 0).count_nonzero()),
            pattern=str(pattern) if pattern else None,
            transposed=transposed,
        )

    def finish(self) -> None:
        """Write the model's other files."""
        self._files.finish()


def _in_file_dtype(name: str, before: Tensor, after: Tensor) -> Tensor:
    """The pruned weight in the dtype of the file; entries that pruning did not touch keep the file's bits.

    So a survivor is exact even where the model computed in a narrower dtype than its file has.
    """
    after = after.to(before.device)
    written = after.to(before.dtype)
    # Back from a wider dtype, untouched entries have the file's bits anyway.
    if torch.promote_types(before.dtype, after.dtype) != after.dtype:
        untouched = (after != 0) & (after == before.to(after.dtype))
        written = torch.where(untouched, before, written)
    if not all_finite(written):
        dtype = dtype_name(before.dtype)
        raise SppError(f"{name}: an updated weight is too large for the checkpoint's {dtype}; use the criterion wanda")
    return written
