"""DSnoT (arXiv 2310.08915): exchange removed and kept weights of a mask, without training.

The expected loss of a row is E = sum of c_j over its removed weights, with c_j = W_j * mean(x_j). In each cycle
every row whose |E| is above a threshold

- grows the removed weight that brings E towards 0 the most for its variance: the largest c_j / var(x_j) of E's sign;
- removes the kept weight of least Wanda score |W_j| * ||x_j|| among those with c_j of the other sign, which bring E
  towards 0 as well. Under an N:M pattern it must come from the same group, whatever its sign, and the exchange is made
  only where E keeps its sign.

A row without a valid exchange has settled. The number of kept weights in every row, or group, does not change.

Differences to the published code:

- Its exchanges may increase |E|, and E may alternate around 0 for all cycles: 50 exchanges in a row of a few hundred
  weights ruin a small model. Here such a row has settled.
- It averages the variances of single windows; var is that over all tokens here, whatever the batches.
- If no candidate is left, it continues with weights that are not candidates; here the row has settled.

Shapes: O output features, I input features, C cycles.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spp.patterns import NM, Pattern
from spp.pruning.calibration.input_statistics import InputMoments
from spp.pruning.criteria.result import Pruned, row_parts, survivors

_CYCLES = 50
# Rows that lose less have settled. The published 0.1 is for E summed over a window of 2048 tokens; ours is a mean.
THRESHOLD = 0.1 / 2048


def refine(weight: Tensor, pruned: Pruned, statistics: InputMoments, pattern: Pattern) -> Pruned:
    """Exchange weights of a mask whose survivors have the values that they had before.

    Args:
        weight: (O, I) before pruning, any float dtype; weights that were zero then stay zero.
        pruned: the result of a criterion.
        statistics: the inputs' moments, from `Moments`.
        pattern: pattern of the mask.
    """
    mask = torch.empty_like(pruned.mask)
    for rows in row_parts(weight):
        mask[rows] = _refined(weight[rows], pruned.mask[rows], statistics, pattern)
    return replace(survivors(weight, mask), note=pruned.note)


def _refined(weight: Tensor, mask: Tensor, statistics: InputMoments, pattern: Pattern) -> Tensor:
    """The mask (O, I) of some rows after all cycles."""
    change = weight.float() * statistics.mean
    grown = _to_grow(change, mask, statistics.variance)
    removed = _to_remove(change, mask, weight.abs().float() * statistics.norm, pattern)
    mask, error = mask.clone(), torch.where(mask, 0, change).sum(dim=1)
    first_sign, unsettled = error.sign(), error.abs() > THRESHOLD
    for _ in range(_CYCLES):
        if not unsettled.any():
            break
        side = (error < 0).long()
        grow, may_grow = grown.next(side)
        remove, may_remove = removed.next(side, grow)
        after = error + _at(change, remove) - _at(change, grow)
        unsettled &= may_grow & may_remove & (error.abs() > THRESHOLD)
        unsettled &= after.abs() < error.abs()
        if isinstance(pattern, NM):
            unsettled &= after.sign() == first_sign
        mask.scatter_(1, remove[:, None], (_at(mask, remove) & ~unsettled)[:, None])
        mask.scatter_(1, grow[:, None], (_at(mask, grow) | unsettled)[:, None])
        error = torch.where(unsettled, after, error)
    return mask


def _to_grow(change: Tensor, mask: Tensor, variance: Tensor) -> _Candidates:
    """Removed weights that bring E towards 0, those first that do most for their variance."""
    # A constant input has no variance, and is the best to grow; where c is 0 as well, 0 / 0 is not above 0.
    gain = torch.where(mask, 0, change / variance)
    return _Candidates(*(torch.where(sign * gain > 0, sign * gain, -torch.inf) for sign in (1, -1)))


def _to_remove(change: Tensor, mask: Tensor, scores: Tensor, pattern: Pattern) -> _Candidates | _InGroup:
    """Kept weights, those of least score first."""
    if isinstance(pattern, NM):
        return _InGroup(torch.where(mask, scores, torch.inf), pattern.m)
    return _Candidates(*(torch.where(mask & (sign * change < 0), -scores, -torch.inf) for sign in (1, -1)))


def _at(values: Tensor, positions: Tensor) -> Tensor:
    """Of every row of (O, I) the entry at its position (O,)."""
    return values.gather(1, positions[:, None])[:, 0]


class _Candidates:
    """Positions to try in every row, in order, as many as there are cycles: one list for E > 0, one for E < 0.

    Args:
        positive: (O, I), the highest come first where E > 0; -inf for what is no candidate.
        negative: (O, I), the same for E < 0.
    """

    def __init__(self, positive: Tensor, negative: Tensor) -> None:
        count = min(_CYCLES, positive.shape[1])
        found = [scores.topk(count, dim=1) for scores in (positive, negative)]
        self._positions = torch.stack([one.indices for one in found])  # (2, O, C)
        self._usable = torch.stack([one.values > -torch.inf for one in found])
        self._next = self._positions.new_zeros(self._positions.shape[:2])
        self._rows = torch.arange(len(positive), device=positive.device)

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
