"""The table of criteria: what each needs to know about a layer's inputs, and its function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spp.patterns import Pattern
from spp.pruning.calibration.input_statistics import InputNorm, Statistic
from spp.pruning.criteria import magnitude, ria, sparsegpt, wanda
from spp.pruning.criteria.result import Pruned
from spp.pruning.options import Criterion


@dataclass(frozen=True)
class Method:
    """A criterion.

    Attributes:
        statistic: what it needs of the layer's inputs; None where it needs no calibration.
        prune: (weight (O, I), value of the statistic, pattern) -> Pruned.
    """

    statistic: type[Statistic] | None
    prune: Callable[[Tensor, Any, Pattern], Pruned]


CRITERIA: dict[Criterion, Method] = {
    "magnitude": Method(None, magnitude.prune),
    "magnitude-matrix": Method(None, magnitude.prune_whole_matrix),
    "wanda": Method(InputNorm, wanda.prune),
    "ria": Method(InputNorm, ria.prune),
    "sparsegpt": Method(sparsegpt.InverseFactor, sparsegpt.prune),
}
