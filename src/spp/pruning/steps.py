"""The steps of pruning a matrix: choose a mask, refine it, update the weights in it. The tables of what each can be.

    mask     a criterion: (weight, what it needs of the inputs, pattern) -> a sparse weight
    refine   (weight, sparse weight, what it needs of the inputs, pattern) -> one with another mask of the same count
    update   (weight, mask, what it needs of the inputs) -> one with that mask and other values

The second and the third are optional. Everything starts from the weight before pruning. Reconstruction, the fourth
step, works on a whole block.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from spp.errors import SppError, UsageError
from spp.patterns import Pattern
from spp.pruning import dsnot, least_squares, swaps
from spp.pruning.calibration.input_statistics import Gram, InputNorm, Moments, Statistic
from spp.pruning.criteria import admm, magnitude, ria, sparsegpt, wanda
from spp.pruning.criteria.result import Pruned
from spp.pruning.options import Criterion, PruningSettings, Refinement, Update

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is common to all steps.

    Attributes:
        title: its name in papers.
        statistic: the statistic of a layer's inputs that it needs; None if it needs no calibration.
        derive: makes of the statistic's value what it works with, once for all layers that share it; None: the value.
        copies: number of fp32 matrices (O, I) that it allocates for a layer at most; one more on a GPU, which works on
            all rows at once.
        squares: number of fp32 matrices (I, I), besides the statistic.
    """

    title: str
    statistic: type[Statistic] | None = None
    derive: Callable[[Any], Any] | None = None
    copies: int = 3
    squares: int = 0

    def inputs(self, statistics: Mapping[type[Statistic], Statistic]) -> Any:
        """What it needs of a layer's inputs; None if nothing."""
        return statistics[self.statistic].value(self.derive) if self.statistic else None


@dataclass(frozen=True, kw_only=True)
class Masking(Step):
    """A criterion.

    Attributes:
        prune: (weight (O, I), inputs, pattern) -> Pruned.
        changes_weights: whether kept weights get new values.
    """

    prune: Callable[[Tensor, Any, Pattern], Pruned]
    changes_weights: bool = False


@dataclass(frozen=True, kw_only=True)
class Refining(Step):
    """An exchange of kept and removed weights.

    Attributes:
        refine: (weight (O, I), sparse weight, inputs, pattern) -> Pruned.
        keeps_values: whether it respects new values of kept weights; else they get back those that they had.
    """

    refine: Callable[[Tensor, Pruned, Any, Pattern], Pruned]
    keeps_values: bool


@dataclass(frozen=True, kw_only=True)
class Updating(Step):
    """New values of kept weights.

    Attributes:
        update: (weight (O, I), mask (O, I), inputs) -> Pruned.
    """

    update: Callable[[Tensor, Tensor, Any], Pruned]


CRITERIA: dict[Criterion, Masking] = {
    "magnitude": Masking(title="magnitude", prune=magnitude.prune),
    "magnitude-matrix": Masking(title="magnitude over the matrix", prune=magnitude.prune_whole_matrix),
    "wanda": Masking(title="Wanda", statistic=InputNorm, prune=wanda.prune),
    "ria": Masking(title="RIA", statistic=InputNorm, prune=ria.prune),
    "sparsegpt": Masking(
        title="SparseGPT",
        statistic=Gram,
        derive=sparsegpt.damped_inverse,
        prune=sparsegpt.prune,
        changes_weights=True,
        squares=2,
    ),
    "admm": Masking(
        title="ADMM",
        statistic=Gram,
        derive=admm.scaled_inverse,
        prune=admm.prune,
        changes_weights=True,
        copies=5,
        squares=2,
    ),
}

REFINEMENTS: dict[Refinement, Refining] = {
    "dsnot": Refining(title="DSnoT", statistic=Moments, refine=dsnot.refine, keeps_values=False),
    "swaps": Refining(title="swaps", statistic=Gram, refine=swaps.refine, keeps_values=True),
}

UPDATES: dict[Update, Updating] = {
    "sparsegpt": Updating(
        title="SparseGPT's update",
        statistic=Gram,
        derive=sparsegpt.damped_inverse,
        update=sparsegpt.update,
        squares=2,
    ),
    "admm": Updating(
        title="ADMM's update", statistic=Gram, derive=admm.scaled_inverse, update=admm.update, copies=5, squares=2
    ),
    "least-squares": Updating(
        title="least squares", statistic=Gram, derive=least_squares.damped, update=least_squares.update, squares=1
    ),
}


@dataclass(frozen=True)
class Steps:
    """The steps that settings ask for, but for reconstruction."""

    masking: Masking
    refining: Refining | None = None
    updating: Updating | None = None

    @property
    def all(self) -> list[Step]:
        """Those that there are, in order."""
        return [step for step in (self.masking, self.refining, self.updating) if step]

    @property
    def title(self) -> str:
        """Their names in papers."""
        return ", ".join(step.title for step in self.all)

    @property
    def statistics(self) -> list[type[Statistic]]:
        """Kinds of statistics that they need."""
        return list(dict.fromkeys(step.statistic for step in self.all if step.statistic))

    def run(self, weight: Tensor, statistics: Mapping[type[Statistic], Statistic], pattern: Pattern) -> Pruned:
        """Prune a weight (O, I), which stays as it is.

        Swaps start from values that make up for what is removed: the criterion's, or else the update's, which is
        made once more on the mask that they find.

        Args:
            weight: before pruning.
            statistics: of the layer's inputs, by kind.
            pattern: how many weights to remove.

        Raises:
            SppError: the inputs do not allow a step, or one has not removed as many weights as it should have.
        """
        masking, refining, updating = self.masking, self.refining, self.updating
        pruned = masking.prune(weight, masking.inputs(statistics), pattern)
        notes = [pruned.note]
        if refining:
            if updating and refining.keeps_values and not masking.changes_weights:
                pruned = updating.update(weight, pruned.mask, updating.inputs(statistics))
            before = int(pruned.mask.sum())
            pruned = refining.refine(weight, pruned, refining.inputs(statistics), pattern)
            if (after := int(pruned.mask.sum())) != before:
                raise SppError(f"{refining.title} kept {after} weights, and not {before}, by a fault of spp")
        if updating:
            pruned = updating.update(weight, pruned.mask, updating.inputs(statistics))
            notes.append(pruned.note)
        if excess := pattern.excess(pruned.mask):
            raise SppError(f"{self.title} removed {excess} weights fewer than pattern {pattern}, by a fault of spp")
        return replace(pruned, note="; ".join(dict.fromkeys(filter(None, notes))) or None)

    def scratch_bytes(self, out_features: int, in_features: int, *, on_gpu: bool) -> int:
        """Most bytes that pruning one matrix takes: fp32 copies of it, squares, and batches of least squares."""
        copies = max(step.copies for step in self.all) + on_gpu + (len(self.all) > 1)
        kinds = {step.derive: step.squares for step in self.all}
        batches = least_squares.scratch_bytes(in_features, on_gpu=on_gpu) if least_squares.damped in kinds else 0
        return _FP32 * (copies * out_features * in_features + sum(kinds.values()) * in_features**2) + batches


def steps_of(settings: PruningSettings) -> Steps:
    """The steps that the settings ask for.

    Raises:
        UsageError: one would undo or repeat another.
    """
    steps = Steps(CRITERIA[settings.criterion], REFINEMENTS.get(settings.refine), UPDATES.get(settings.update))
    if steps.refining and not (steps.refining.keeps_values or steps.updating) and steps.masking.changes_weights:
        others = ", ".join(name for name, other in CRITERIA.items() if not other.changes_weights)
        raise UsageError(
            f"refine {settings.refine} exchanges weights, and {settings.criterion} has changed them; "
            f"use one of {others}, or refine swaps, or add an update"
        )
    if settings.update == settings.criterion and not steps.refining:
        raise UsageError(f"criterion {settings.criterion} makes the update {settings.update} itself; leave out update")
    return steps
