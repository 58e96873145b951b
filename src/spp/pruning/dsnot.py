"""DSnoT (arXiv 2310.08915): exchange removed and kept weights of a mask, without training.

What a row loses in expectation is E = sum of c_j over its removed weights, with c_j = W_j * mean(x_j). In each cycle
every row whose |E| is above a threshold

- grows the removed weight that brings E towards 0 the most for its variance: the largest c_j / var(x_j) of E's sign;
- removes the kept weight of least Wanda score |W_j| * ||x_j|| among those with c_j of the other sign, which bring E
  towards 0 as well. Under an N:M pattern it must come from the same group, whatever its sign, and the exchange is made
  only where E keeps its sign.

A row that cannot go on has settled. So every row, or group, keeps as many weights as it had.

Shapes: O output features, I input features, C cycles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spp.patterns import NM, Pattern
from spp.pruning.result import Pruned, survivors
from spp.pruning.statistics import InputMoments

_CYCLES = 50
# The published 0.1 is for E summed over a window of 2048 tokens; here E is a mean over tokens.
_THRESHOLD = 0.1 / 2048


# Rows are independent; so many at a time keep the scratch small.
_ROWS = 1024


def refine(weight: Tensor, pruned: Pruned, statistics: InputMoments, pattern: Pattern) -> Pruned:
    """Exchange weights of a mask whose survivors have the values that they had before.

    Args:
        weight: (O, I) before pruning, any float dtype; weights that were zero then stay zero.
        pruned: what a criterion made of it.
        statistics: `Moments`.
        pattern: of the mask.
    """
    parts = zip(weight.split(_ROWS), pruned.mask.split(_ROWS), strict=True)
    return survivors(weight, torch.cat([_refined(part, mask, statistics, pattern) for part, mask in parts]))


def _refined(weight: Tensor, mask: Tensor, statistics: InputMoments, pattern: Pattern) -> Tensor:
    """The mask (O, I) of some rows after all cycles."""
    mask = mask.clone()
    change = weight.float() * statistics.mean
    scores = weight.abs().float() * statistics.norm
    # A constant input has no variance, and is the best to grow; where c is 0 as well there is nothing to gain.
    gain = torch.where(mask, 0, change / statistics.variance).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    grown = _Candidates.highest(gain, -gain)
    if isinstance(pattern, NM):
        removed: _Candidates | _InGroup = _InGroup(torch.where(mask, scores, torch.inf), pattern.m)
    else:
        lowest = [torch.where(mask & (sign * change < 0), 1 / scores, 0) for sign in (1, -1)]
        removed = _Candidates.highest(*lowest)
    error = torch.where(mask, 0, change).sum(dim=1)
    first_sign, unsettled = error.sign(), error.abs() > _THRESHOLD
    for _ in range(_CYCLES):
        if not unsettled.any():
            break
        side = (error < 0).long()
        grow, may_grow = grown.next(side)
        remove, may_remove = removed.next(side, grow)
        after = error + _at(change, remove) - _at(change, grow)
        unsettled &= may_grow & may_remove & (error.abs() > _THRESHOLD)
        if isinstance(pattern, NM):
            unsettled &= after.sign() == first_sign
        mask.scatter_(1, remove[:, None], (_at(mask, remove) & ~unsettled)[:, None])
        mask.scatter_(1, grow[:, None], (_at(mask, grow) | unsettled)[:, None])
        error = torch.where(unsettled, after, error)
    return mask


def _at(values: Tensor, positions: Tensor) -> Tensor:
    """Of every row of (O, I) the entry at its position (O,)."""
    return values.gather(1, positions[:, None])[:, 0]


class _Candidates:
    """Positions to try in every row, in order: one list for E > 0, one for E < 0.

    Args:
        positions: (2, O, C).
        usable: (2, O, C) bool.
    """

    def __init__(self, positions: Tensor, usable: Tensor) -> None:
        self._positions, self._usable = positions, usable
        self._next = positions.new_zeros(positions.shape[:2])
        self._rows = torch.arange(positions.shape[1], device=positions.device)

    @classmethod
    def highest(cls, positive: Tensor, negative: Tensor) -> _Candidates:
        """Those with the highest scores (O, I), as many as there are cycles; only scores above 0 count."""
        count = min(_CYCLES, positive.shape[1])
        found = [scores.topk(count, dim=1) for scores in (positive, negative)]
        return cls(torch.stack([one.indices for one in found]), torch.stack([one.values > 0 for one in found]))

    def next(self, side: Tensor, _: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next position (O,) of the list that each row is at (O,), and whether there was one."""
        number = self._next[side, self._rows]
        self._next[side, self._rows] += 1
        known = number < self._positions.shape[2]
        number = number.clamp(max=self._positions.shape[2] - 1)
        return self._positions[side, self._rows, number], known & self._usable[side, self._rows, number]


class _InGroup:
    """The position of least score in the group of another position.

    Args:
        scores: (O, I), infinite for what was not kept.
        size: M.
    """

    def __init__(self, scores: Tensor, size: int) -> None:
        self._scores, self._size = scores, size

    def next(self, _: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        """The position (O,) in the group of `grown` (O,), and whether there was one; none comes twice."""
        starts = grown - grown % self._size
        group = starts[:, None] + torch.arange(self._size, device=grown.device)
        score, offset = self._scores.gather(1, group).min(dim=1)
        position = starts + offset
        self._scores.scatter_(1, position[:, None], torch.inf)
        return position, score < torch.inf
