"""SparseGPT (arXiv 2301.00774, algorithm 1), literally: column by column, updating all later columns each time.

The readable version of `spp.pruning.criteria.sparsegpt`, which processes columns by halves, so that nearly all of the
work is matrix products. Slow: O(O I^2) in I steps.

Shapes: O output features, I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spp.keep_masks import keep_all_but_lowest
from spp.patterns import NM, Pattern
from spp.pruning.criteria.result import Pruned
from spp.pruning.criteria.sparsegpt import Inverse, block_size


def sparsegpt(weight: Tensor, inverse: Inverse, pattern: Pattern) -> Pruned:
    """Remove the weights of least (W_j / U_jj)^2, and update those to the right: W_k -= W_j U_jk / U_jj.

    Args:
        weight: (O, I), any float dtype; weights that are zero stay zero.
        inverse: of the layer's damped Hessian, H^-1 = U^T U; its factor is U_jk / U_jj, its scale U_jj.
        pattern: how many weights to remove.

    Returns:
        The weight in the dtype of the inverse.
    """
    w = weight.to(inverse.factor.dtype, copy=True)
    w[:, inverse.dead] = 0
    mask = w != 0
    size = pattern.m if isinstance(pattern, NM) else block_size(pattern)
    for start in range(0, w.shape[1], size):
        end = min(start + size, w.shape[1])
        for j in range(start, end):
            if j == start:
                mask[:, start:end] &= _choose(w[:, start:end], mask[:, start:end], inverse.scale, start, pattern)
            removed = w[:, j].masked_fill(mask[:, j], 0)
            w[:, j:] -= removed[:, None] * inverse.factor[j, j:]
            w[~mask[:, j], j] = 0
    return Pruned(w, mask, inverse.note)


def _choose(w: Tensor, may_stay: Tensor, scale: Tensor, start: int, pattern: Pattern) -> Tensor:
    """The mask of some columns, before the first of them is settled; what is zero already goes first."""
    rows, columns = w.shape
    scores = (w.abs() / scale[start : start + columns]).masked_fill(~may_stay, -torch.inf)
    if isinstance(pattern, NM):
        return keep_all_but_lowest(scores, pattern.m - pattern.n)
    count = pattern.removed_of((start + columns) * rows) - pattern.removed_of(start * rows)
    return keep_all_but_lowest(scores.reshape(1, -1), count).view_as(scores)
