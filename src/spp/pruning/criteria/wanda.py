"""Wanda (arXiv 2306.11695): a weight's score is its absolute value times the norm of its input.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from torch import Tensor

from spp.patterns import Pattern
from spp.pruning.criteria.result import Pruned, prune_rows


def prune(weight: Tensor, input_norm: Tensor, pattern: Pattern) -> Pruned:
    """Remove the weights of least |W[i, j]| * ||X[:, j]||_2 (Wanda eq. 1), compared within each row or group.

    Args:
        weight: (O, I), any float dtype.
        input_norm: (I,) fp32, ||X[:, j]||_2 over the calibration, from `InputNorm`.
        pattern: how many weights to remove.
    """
    return prune_rows(weight, pattern, lambda rows: rows.abs().float() * input_norm)
