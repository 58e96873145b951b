"""Magnitude pruning: the smallest weights go. The baseline of every pruning paper.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from torch import Tensor

from spp.patterns import NM, Pattern
from spp.pruning.result import Pruned, survivors


def prune(weight: Tensor, statistics: Tensor | None, pattern: Pattern) -> Pruned:
    """Remove the weights of least |W|, compared within each row (or each group of an N:M pattern).

    Args:
        weight: (O, I), any float dtype.
        statistics: not used.
        pattern: how many weights to remove.
    """
    return survivors(weight, pattern.keep_mask(weight.abs().float()))


def prune_whole_matrix(weight: Tensor, statistics: Tensor | None, pattern: Pattern) -> Pruned:
    """Remove the weights of least |W|, compared over the whole matrix, as the baseline in Wanda's repository does.

    The same as `prune` for an N:M pattern. Rows may end up with different numbers of survivors.
    """
    if isinstance(pattern, NM):
        return prune(weight, statistics, pattern)
    scores = weight.abs().float().reshape(1, -1)
    return survivors(weight, pattern.keep_mask(scores).view_as(weight))
