"""Which tensors of a model have to obey a pattern, and whether they do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from spp.checkpoints.checkpoint import Checkpoint
from spp.errors import UsageError
from spp.ops.zeros import SPARSE_FROM
from spp.options import is_one_of, listed_names
from spp.patterns import NM, Pattern


@dataclass
class Obedience:
    """What became of the matrices in a check against a pattern.

    Attributes:
        pattern: that they are checked against.
        required: names of the tensors that have to obey; None where the zeros of BASE have to tell.
        because: who says so, in words.
        checked: names of the tensors that were checked.
        matrices: matrices that were checked; stacked experts are counted one by one.
        dense: names of the other matrices, which are dense or hardly sparse.
    """

    pattern: Pattern
    required: set[str] | None
    because: str
    orientation: dict[str, bool]
    checked: list[str] = field(default_factory=list)
    matrices: int = 0
    dense: list[str] = field(default_factory=list)

    @classmethod
    def asked(cls, pattern: Pattern, targets: str | None, base: Checkpoint, other: Checkpoint) -> Obedience:
        """From the names that the user gave, else from what a model says that it was pruned by, else from its zeros.

        Raises:
            UsageError: a name that the user gave is no tensor's.
        """
        stored = next((one.manifest["tensors"] for one in (base, other) if _lists_tensors(one)), {})
        orientation = {name: bool(one.get("transposed")) for name, one in stored.items() if isinstance(one, dict)}
        if targets is not None:
            return cls(pattern, _named(targets, base), "named by --targets", orientation)
        if stored:
            return cls(pattern, set(stored), "listed in the manifest as pruned", orientation)
        return cls(pattern, None, f"{SPARSE_FROM:.0%} zeros or more in BASE, as nothing lists those pruned", {})

    def check(self, name: str, base: Tensor, weight: Tensor, *, transposed: bool) -> str | None:
        """What is wrong with a tensor of OTHER, given with that of BASE; in words, or None."""
        if weight.ndim < 2:
            return None
        if not (_looks_pruned(base) if self.required is None else name in self.required):
            self.dense.append(name)
            return None
        self.checked.append(name)
        known = self.orientation.get(name, transposed if weight.ndim == 2 else None)
        matrices = weight.reshape(-1, *weight.shape[-2:])
        self.matrices += len(matrices)
        broken = [self._violations(matrix, known) for matrix in matrices]
        if not (count := sum(broken)):
            return None
        unit = "groups" if isinstance(self.pattern, NM) else "zeros too few"
        where = f" (in {sum(map(bool, broken))} of {len(broken)} matrices)" if len(broken) > 1 else ""
        verb = "break" if isinstance(self.pattern, NM) else "for"
        return f"{name}: {count} {unit} {verb} the pattern {self.pattern}{where}"

    def missing(self) -> Iterator[str]:
        """What has to obey and was not found, in words."""
        for name in sorted((self.required or set()) - set(self.checked)):
            yield f"{name}: it is {self.because}, and it was not there to be checked against {self.pattern}"
        if not self.checked and not self.required:
            yield f"no weight of BASE is sparse enough for the pattern {self.pattern}: is BASE the pruned model?"

    def _violations(self, matrix: Tensor, transposed: bool | None) -> int:
        """Of a matrix as it is stored; where that may be (I, O) or (O, I), of the better one."""
        if transposed is None:
            return min(self.pattern.violations(matrix), self.pattern.violations(matrix.T))
        return self.pattern.violations(matrix.T if transposed else matrix)


def is_pruned(checkpoint: Checkpoint, name: str, weight: Tensor) -> bool:
    """Whether a tensor of a model is pruned: its manifest lists it, or else, without such a list, its zeros tell."""
    return name in checkpoint.manifest["tensors"] if _lists_tensors(checkpoint) else _looks_pruned(weight)


def _looks_pruned(weight: Tensor) -> bool:
    """Whether enough is zero outside of rows that are all zero, as embeddings of padding tokens are."""
    rows = weight.reshape(-1, weight.shape[-1])
    rows = rows[(rows != 0).any(dim=-1)]
    return int((rows == 0).count_nonzero()) >= max(1, SPARSE_FROM * weight.numel())


def _lists_tensors(checkpoint: Checkpoint) -> bool:
    return isinstance(checkpoint.manifest.get("tensors"), dict) and bool(checkpoint.manifest["tensors"])


def _named(targets: str, base: Checkpoint) -> set[str]:
    """The tensors that names separated by commas mean: whole names, or their last parts without `.weight`."""
    wanted = listed_names(targets)

    def means(full: str, name: str) -> bool:
        return is_one_of(full, [name]) or is_one_of(full.removesuffix(".weight"), [name])

    if unknown := [name for name in wanted if not any(means(full, name) for full in base.names)]:
        raise UsageError(
            f"targets: {', '.join(unknown)} is no tensor of {base.folder}, nor the last part of one's name"
        )
    if not wanted:
        raise UsageError("targets is empty; name tensors, or leave it out")
    return {full for full in base.names if any(means(full, name) for name in wanted)}
