"""Find the tensors in a model's files that an adapter changes.

Shapes: E experts, O output features, I input features, R row groups, K directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from spp.adapters.factors import Factors
from spp.adapters.spp_format import Adapter
from spp.adapters.trained_whole import Whole
from spp.checkpoints.checkpoint import Checkpoint
from spp.checkpoints.obeying import is_pruned
from spp.errors import SppError
from spp.models.weight_map import Part
from spp.models.weight_names import WeightNames, weights_in_files
from spp.ops.dtypes import FLOATS
from spp.ops.reference import mixture, row_groups, wide_dtype
from spp.ops.zero_proof import lost_zeros
from spp.ops.zeros import is_float

_MERGED_DTYPES = [one.safetensors for one in FLOATS.values()]


class NewWeight(Protocol):
    """What a weight becomes."""

    def merge(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The new weight, laid out as the old one is, rounded once to `dtype`; +0.0 where the old one is zero."""
        ...


@dataclass(frozen=True)
class Update:
    """What one tensor of the files is merged with: factors, and whether it is stored as (I, O) or (E, I, O)."""

    factors: Factors
    transposed: bool

    def merge(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """W', rounded once, laid out as W is."""
        if not self.transposed:
            return self.factors.merge(weight, dtype)
        return self.factors.merge(weight.mT, dtype).mT.contiguous()


@dataclass(frozen=True)
class Changes:
    """All that training changes in the files of a model.

    Attributes:
        updates: tensor -> what it becomes, with its zeros.
        replaced: tensor -> what replaces it, or rows of it, as it is: a dense weight, of which nothing is proved.
        added: new tensor -> the one that it was tied to, of which it becomes a copy, with its own replacement if there
            is one in `replaced`.
        unties: whether the configuration has to say that the model's embeddings are no longer tied.
    """

    updates: Mapping[str, NewWeight]
    replaced: dict[str, Whole] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    unties: bool = False

    def keep(self, base: Checkpoint, name: str) -> bool:
        """Whether a tensor keeps its values."""
        return name in base.files and name not in self.updates and name not in self.replaced

    def is_dense(self, name: str) -> bool:
        """Whether a tensor of the result is a dense weight, of which nothing is to be proved."""
        return name in self.replaced or name in self.added

    def source(self, name: str) -> str:
        """The tensor of the base that a tensor of the result is made from."""
        return self.added.get(name, name)


def match_adapter(base: Checkpoint, adapter: Adapter, folder: Path) -> Changes:
    """The adapter's changes by the tensors in the files.

    Raises:
        SppError: some do not fit, so that the adapter belongs to another model; or a pruned weight was trained whole.
    """
    names = weights_in_files(base)
    updates: dict[str, Update] = {}
    problems = []
    for module, factors in adapter.factors.items():
        parts = names.parts.get(module, {})
        problem = None if parts else f"it has no weight for {module}"
        for name, part in parts.items():
            found = _update(base, name, factors, part)
            problem = problem or _misfit(base, name, found)
            if found is not None and updates.setdefault(name, found) is not found:
                problem = problem or f"it has {name} for {module}, and for another module as well"
        problems += [problem] if problem else []
    changes = _with_whole(base, Changes(updates), adapter, names, problems)
    if problems:
        raise SppError(
            f"adapter {folder} was trained for another model than {base.folder}: {len(problems)} of "
            f"{len(adapter.factors) + len(adapter.whole)} weights do not fit; first of them: {problems[0]}"
        )
    for name in _lost(base, changes):
        raise SppError(
            f"adapter {folder} has a dense {name}, which is pruned in {base.folder}, so that its zeros would be lost; "
            "train it with SPP: take it out of modules_to_save"
        )
    return changes


def _misfit(base: Checkpoint, name: str, found: Update | None) -> str | None:
    """Why factors cannot be merged into a tensor, or None."""
    if found is None:
        return f"its {name} is laid out in another way than the model's weight"
    if base.layouts[name].dtype not in _MERGED_DTYPES:
        return f"its {name} is {base.layouts[name].dtype}, and only {', '.join(_MERGED_DTYPES)} can be merged into"
    if base.shape(name) != (wanted := found.factors.stored_shape(found.transposed)):
        return f"its {name} is {base.shape(name)}, the adapter's {wanted}"
    return None


def _update(base: Checkpoint, name: str, factors: Factors, part: Part) -> Update | None:
    """The update of a tensor that is a whole weight, or whole rows of it; None for other parts."""
    if not part.steps:
        return Update(factors, not factors.of_experts and base.transposed(name))
    shape = factors.stored_shape(transposed=False)
    if (found := part.rows(shape)) is None:
        return None
    rows, transposed = found
    if not factors.of_experts:
        return Update(_of_rows(factors, rows), transposed) if rows.ndim == 1 else None
    experts, rows = rows // shape[1], rows % shape[1]
    if not experts.eq(experts[..., :1]).all():
        return None
    if rows.ndim == 1:
        return Update(_of_rows(factors[int(experts[0])], rows), transposed)
    own = [_of_rows(factors[int(expert[0])], one) for expert, one in zip(experts, rows, strict=True)]
    return Update(Factors.stack(own), transposed)


def _of_rows(factors: Factors, rows: Tensor) -> Factors:
    """The factors of some rows of a weight, (n,), which the files hold by themselves."""
    out_features, count, directions = len(factors.B), factors.groups, factors.directions
    if rows.equal(torch.arange(out_features)):
        return factors
    groups, B = row_groups(out_features, count)[rows], factors.B[rows]
    A = factors.A.unflatten(0, (count, directions))
    finer = row_groups(len(rows), count)
    outer = torch.zeros(count, dtype=groups.dtype).scatter_(0, finer, groups)
    if count * directions <= len(rows) and outer[finer].equal(groups):
        return Factors(A=A[outer].flatten(0, 1), B=B, scale=factors.scale)
    # Groups do not end where the part does: what each row is multiplied with, with the bits that merging gives it.
    wide = wide_dtype(A, B)
    multiplier = mixture([A[groups, k].to(wide) for k in range(directions)], factors.scale * B.to(wide))
    return Factors(A=multiplier, B=torch.ones(len(rows), 1), scale=1.0)


def _with_whole(
    base: Checkpoint, changes: Changes, adapter: Adapter, names: WeightNames, problems: list[str]
) -> Changes:
    """The changes and those of the weights that were trained whole; what does not fit is added to `problems`."""
    untied = _untied(adapter, names)
    found = {name: _only_part(names, source) for name, source in untied.items() if name not in base.files}
    added = {name: source for name, source in found.items() if source is not None}
    problems += [f"it has no tensor for {untied[name]}" for name in found.keys() - added.keys()]
    replaced: dict[str, Whole] = {}
    for name, whole in adapter.whole.items():
        values = whole.values.mT if name in names.transposed else whole.values
        parts = {name: Part(name)} if name in added else _parts(names, name)
        if not parts:
            problems.append(
                f"it has no tensor for {name}, which was trained whole; PEFT can merge it (PeftModel.merge_and_unload)"
            )
        for stored, part in parts.items():
            replaced[stored] = replace(whole, values=part.view(values).contiguous()) if part.steps else whole
            problems += _other_shape(stored, base.shape(added.get(stored, stored)), replaced[stored])
    return replace(changes, replaced=replaced, added=added, unties=bool(untied))


def _parts(names: WeightNames, name: str) -> dict[str, Part]:
    """The tensors in the files that are parts of a parameter, or of the one that it is tied to."""
    both = (one.removesuffix(".weight") for one in (name, names.tied.get(name, name)))
    return next((names.parts[one] for one in both if one in names.parts), {})


def _untied(adapter: Adapter, names: WeightNames) -> dict[str, str]:
    """Each tied weight that differs, after training, from the one that it is tied to -> the latter."""
    untied = {}
    for name, source in names.tied.items():
        both = [adapter.whole.get(one) for one in (name, source)]
        if all(one is None or one.rows is not None for one in both):
            continue  # PEFT ties trained rows, too
        head, embedding = both
        if head is None or embedding is None or not head.values.equal(embedding.values):
            untied[name] = source
    return untied


def _only_part(names: WeightNames, name: str) -> str | None:
    """The tensor in the files that is a whole parameter."""
    return next((stored for stored, part in _parts(names, name).items() if not part.steps), None)


def _other_shape(name: str, before: tuple[int, ...], whole: Whole) -> Iterator[str]:
    if whole.shape(before) != before:
        yield (
            f"its {name} is {before}, the adapter's {whole.shape(before)}; if the vocabulary was resized for training, "
            "resize the model's in the same way (resize_token_embeddings), save it, and merge into that"
        )


def _lost(base: Checkpoint, changes: Changes) -> Iterator[str]:
    """Pruned tensors whose zeros a replacement would lose."""
    for name, whole in changes.replaced.items():
        before = base.read(changes.source(name))
        if is_float(before) and is_pruned(base, name, before) and lost_zeros(before, whole.applied(before)):
            yield name
