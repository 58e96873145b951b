"""The result of a criterion.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spp.keep_masks import rows_at_once
from spp.patterns import Pattern


@dataclass(frozen=True)
class Pruned:
    """A pruned weight.

    Attributes:
        weight: (O, I); +0.0 wherever the mask is False.
        mask: (O, I) bool, True for the kept weights.
        note: a remark for the user, or None.
    """

    weight: Tensor
    mask: Tensor
    note: str | None = None


def lowest_where_zero(scores: Tensor, weight: Tensor) -> Tensor:
    """Scores (O, I) changed so that weights that are already zero are removed first; a sparse model keeps its zeros."""
    return torch.where(weight == 0, -torch.inf, scores)


def survivors(weight: Tensor, mask: Tensor) -> Pruned:
    """The weight (O, I) with everything outside of `mask` (O, I) set to +0.0; survivors keep their bits.

    Zeros inside of the mask are taken out of it. Not computed as a product with the mask, which could give -0.0.
    """
    gone = (weight == 0) | ~mask
    return Pruned(weight.masked_fill(gone, 0), gone.logical_not_())


def prune_rows(weight: Tensor, pattern: Pattern, score: Callable[[Tensor], Tensor]) -> Pruned:
    """Remove the weights of least score, compared within each row or group; weights that are zero already go first.

    It processes some rows at a time, so that it needs little scratch memory, whatever the size of the matrix.

    Args:
        weight: (O, I), any float dtype.
        pattern: how many weights to remove.
        score: rows of the weight (o, I) -> their scores (o, I) in a float dtype.
    """
    kept, mask = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool)
    for rows in row_parts(weight):
        part = weight[rows]
        pruned = survivors(part, pattern.keep_mask(lowest_where_zero(score(part), part), rows.start))
        kept[rows], mask[rows] = pruned.weight, pruned.mask
    return Pruned(kept, mask)


def row_parts(weight: Tensor) -> Iterator[slice]:
    """Slices of rows of a (O, I) matrix that are worked on together."""
    rows, size = len(weight), rows_at_once(weight)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
