"""The table of criteria, with everything that the rest of the package needs to know about each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spp.errors import UsageError
from spp.patterns import Pattern
from spp.pruning.calibration.input_statistics import InputNorm, Statistic
from spp.pruning.criteria import magnitude, ria, sparsegpt, wanda
from spp.pruning.criteria.result import Pruned
from spp.pruning.options import Criterion, PruningSettings

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Method:
    """A criterion.

    Attributes:
        title: its name in papers.
        statistic: the statistic of a layer's inputs that it needs; None if it needs no calibration.
        prune: (weight (O, I), value of the statistic, pattern) -> Pruned.
        changes_weights: whether kept weights get new values, so that the mask cannot be refined afterwards.
        squares: number of fp32 matrices (I, I) that it allocates for a layer at most, besides the statistic.
    """

    title: str
    statistic: type[Statistic] | None
    prune: Callable[[Tensor, Any, Pattern], Pruned]
    changes_weights: bool
    squares: int

    def scratch_bytes(self, out_features: int, in_features: int, *, on_gpu: bool) -> int:
        """Most bytes that pruning one matrix takes: fp32 copies of it, and squares."""
        copies = 4 if on_gpu else 3  # a GPU works on all rows at once
        return _FP32 * (copies * out_features * in_features + self.squares * in_features**2)


CRITERIA: dict[Criterion, Method] = {
    "magnitude": Method(title="magnitude", statistic=None, prune=magnitude.prune, changes_weights=False, squares=0),
    "magnitude-matrix": Method(
        title="magnitude over the matrix",
        statistic=None,
        prune=magnitude.prune_whole_matrix,
        changes_weights=False,
        squares=0,
    ),
    "wanda": Method(title="Wanda", statistic=InputNorm, prune=wanda.prune, changes_weights=False, squares=0),
    "ria": Method(title="RIA", statistic=InputNorm, prune=ria.prune, changes_weights=False, squares=0),
    "sparsegpt": Method(
        title="SparseGPT",
        statistic=sparsegpt.InverseFactor,
        prune=sparsegpt.prune,
        changes_weights=True,
        squares=2,
    ),
}


def method_of(settings: PruningSettings) -> Method:
    """The criterion that the settings ask for.

    Raises:
        UsageError: it changes weights, and the settings would exchange some of them afterwards.
    """
    method = CRITERIA[settings.criterion]
    if settings.refine and method.changes_weights:
        others = ", ".join(name for name, other in CRITERIA.items() if not other.changes_weights)
        raise UsageError(
            f"refine {settings.refine} exchanges weights, and {settings.criterion} has changed them; "
            f"use one of {others}"
        )
    return method
