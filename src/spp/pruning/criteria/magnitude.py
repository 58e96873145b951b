"""Magnitude pruning: remove the smallest weights. The baseline of every pruning paper.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from torch import Tensor

from spp.patterns import NM, Pattern
from spp.pruning.criteria.result import Pruned, prune_rows, survivors


def prune(weight: Tensor, _: None, pattern: Pattern) -> Pruned:
    """Remove the weights of least |W|, compared within each row (or each group of an N:M pattern).

    Args:
        weight: (O, I), any float dtype.
        pattern: how many weights to remove.
    """
    return prune_rows(weight, pattern, Tensor.abs)


def prune_whole_matrix(weight: Tensor, _: None, pattern: Pattern) -> Pruned:
    """Remove the weights of least |W|, compared over the whole matrix, as the baseline in Wanda's repository does.

    The same as `prune` for an N:M pattern. Rows may end up with different numbers of survivors.
    """
    if isinstance(pattern, NM):
        return prune(weight, None, pattern)
    return survivors(weight, pattern.keep_mask(weight.abs().reshape(1, -1)).view_as(weight))
