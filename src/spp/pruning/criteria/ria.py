"""RIA (ICLR 2024, "Plug-and-Play"): a weight's score is its share in its row and its column, times input activity.

So no input or output channel is removed completely, as Wanda may do with channels of small weights.

Shapes: O output features, I input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spp.patterns import Pattern
from spp.pruning.criteria.result import Pruned, prune_rows, row_parts

_POWER = 0.5


def prune(weight: Tensor, input_norm: Tensor, pattern: Pattern) -> Pruned:
    """Remove the weights of least relative importance and activation, compared within each row or group.

    The score of W[i, j] is (|W[i, j]| / sum_k |W[i, k]| + |W[i, j]| / sum_k |W[k, j]|) * ||X[:, j]||_2 ^ 0.5.

    Args:
        weight: (O, I), any float dtype.
        input_norm: (I,) fp32, ||X[:, j]||_2 over the calibration, from `InputNorm`.
        pattern: how many weights to remove.
    """
    columns, root = _column_sums(weight), input_norm**_POWER

    def score(rows: Tensor) -> Tensor:
        size = rows.abs().float()
        # Where a sum is zero, so are all of its weights, which go first whatever their score.
        return (size / size.sum(dim=1, keepdim=True)).add_(size / columns).mul_(root)

    return prune_rows(weight, pattern, score)


def _column_sums(weight: Tensor) -> Tensor:
    """sum_k |W[k, j]| of every column, (I,) fp32."""
    sums = torch.zeros(weight.shape[1], device=weight.device)
    for rows in row_parts(weight):
        sums += weight[rows].abs().float().sum(dim=0)
    return sums
