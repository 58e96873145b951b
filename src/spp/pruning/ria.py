"""RIA (ICLR 2024, "Plug-and-Play"): weights are scored by their share of their row and of their column.

So no input or output channel is pruned away as a whole, which Wanda may do to channels of small weights.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from torch import Tensor

from spp.patterns import Pattern
from spp.pruning.result import Pruned, lowest_where_zero, survivors

_POWER = 0.5


def prune(weight: Tensor, statistics: Tensor | None, pattern: Pattern) -> Pruned:
    """Remove the weights of least relative importance and activation, compared within each row or group.

    The score of W[i, j] is (|W[i, j]| / sum_k |W[i, k]| + |W[i, j]| / sum_k |W[k, j]|) * ||X[:, j]||_2 ^ 0.5.

    Args:
        weight: (O, I), any float dtype.
        statistics: (I,) fp32, `InputNorm`.
        pattern: how many weights to remove.
    """
    if statistics is None:
        raise ValueError("RIA needs the norm of the inputs")
    size = weight.abs().float()
    # Where a sum is zero, so are all of its weights, which go first whatever their score.
    scores = (size / size.sum(dim=1, keepdim=True) + size / size.sum(dim=0)) * statistics**_POWER
    return survivors(weight, pattern.keep_mask(lowest_where_zero(scores, weight)))
