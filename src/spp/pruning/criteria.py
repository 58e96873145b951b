"""The table of criteria: what each needs to know about a layer's inputs, and its function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from spp.options import Criterion
from spp.patterns import Pattern
from spp.pruning import magnitude, sparsegpt, wanda
from spp.pruning.result import Pruned
from spp.pruning.statistics import Gram, InputNorm, Statistic


@dataclass(frozen=True)
class Method:
    """A criterion.

    Attributes:
        statistic: what it needs of the layer's inputs; None where it needs no calibration.
        prune: (weight (O, I), value of the statistic, pattern) -> Pruned.
    """

    statistic: type[Statistic] | None
    prune: Callable[[Tensor, Tensor | None, Pattern], Pruned]


CRITERIA: dict[Criterion, Method] = {
    "magnitude": Method(None, magnitude.prune),
    "wanda": Method(InputNorm, wanda.prune),
    "sparsegpt": Method(Gram, sparsegpt.prune),
}
