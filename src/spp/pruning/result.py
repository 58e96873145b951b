"""What every criterion returns.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pruned:
    """A pruned weight.

    Attributes:
        weight: (O, I); +0.0 wherever the mask is False.
        mask: (O, I) bool, True for the survivors.
        note: what the user should know about how it came out, or None.
    """

    weight: Tensor
    mask: Tensor
    note: str | None = None


def lowest_where_zero(scores: Tensor, weight: Tensor) -> Tensor:
    """Scores (O, I) under which weights that are zero already go first, so that a sparse model keeps its zeros."""
    return torch.where(weight == 0, -torch.inf, scores)


def survivors(weight: Tensor, mask: Tensor) -> Pruned:
    """The weight (O, I) with everything outside of `mask` (O, I) set to +0.0; survivors keep their bits.

    Zeros inside of the mask leave it. Never a product with the mask, which would write -0.0.
    """
    mask = mask & (weight != 0)
    return Pruned(torch.where(mask, weight, torch.zeros_like(weight)), mask)
