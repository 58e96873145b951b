"""Swaps (arXiv 2512.10922): exchange a kept and a removed weight where that lowers the error of the layer's outputs.

A row w of a layer with H = 2/T X^T X and its sparse version v has the error E = (w - v) H (w - v)^T. With
c = (w - v) H, removing the kept weight i and giving the removed weight j the value a changes E by exactly

    2 v_i c_i + v_i^2 H_ii - 2 a c_j + a^2 H_jj - 2 v_i a H_ij.

As published, a is w_j, and all survivors have the values that they had. Where they have new values, a is the best one:

    a = (c_j + v_i H_ij) / H_jj, which changes E by 2 v_i c_i + v_i^2 H_ii - (c_j + v_i H_ij)^2 / H_jj.

Each row makes the best exchange of a short list as long as it lowers E, so E never rises. A list has the weights whose
removal costs least and those whose return gains most, each by itself; for N:M, the groups in which these two are best
together, as exchanges are made inside of a group. It is made anew after a round of exchanges, until there is none.

Shapes: O output features, I input features, G listed groups of a row (1 if there are none), K listed kept weights of
each, R listed removed ones, L = G (K + R).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from spp.keep_masks import rows_at_once
from spp.patterns import NM, Pattern
from spp.pruning.calibration.input_statistics import full_fp32
from spp.pruning.criteria.result import Pruned, survivors

# Kept weights, and removed ones, of a short list.
_LISTED = 16
_ROUNDS = 30
# An exchange that lowers a row's error by a smaller share of it is rounding.
_LEAST_GAIN = 1e-6
# A round ends when fewer rows than this share have an exchange left in their lists.
_FEW = 1 / 16


def refine(weight: Tensor, pruned: Pruned, hessian: Tensor, pattern: Pattern) -> Pruned:
    """Exchange weights of a mask; every row, or group, keeps as many as before.

    Args:
        weight: (O, I) before pruning, any float dtype; weights that were zero then stay zero.
        pruned: its sparse version; if all survivors have the values that they had, they keep their bits.
        hessian: (I, I) fp32.
        pattern: pattern of the mask.

    Returns:
        The weight in fp32 where survivors have new values.
    """
    original = survivors(weight, pruned.mask)
    fixed = original.weight.equal(pruned.weight.to(weight.dtype)) and pruned.weight.dtype == weight.dtype
    value, mask = torch.empty_like(weight, dtype=torch.float32), torch.empty_like(pruned.mask)
    size = rows_at_once(weight)
    with full_fp32():
        for start in range(0, len(weight), size):
            rows = slice(start, start + size)
            part = _Rows.of(weight[rows].float(), pruned.weight[rows].float(), pruned.mask[rows], hessian)
            value[rows], mask[rows] = _exchanged(part, hessian, pattern, fixed=fixed)
    if fixed:
        return replace(survivors(weight, mask), note=pruned.note)
    return replace(survivors(value, mask), note=pruned.note)


@dataclass
class _Rows:
    """Some rows of a layer.

    Attributes:
        weight: (O, I) w, before pruning.
        value: (O, I) v; 0 outside of the mask.
        mask: (O, I) bool.
        slope: (O, I) c.
    """

    weight: Tensor
    value: Tensor
    mask: Tensor
    slope: Tensor

    @classmethod
    def of(cls, weight: Tensor, value: Tensor, mask: Tensor, hessian: Tensor) -> _Rows:
        return cls(weight, value, mask, (weight - value) @ hessian)

    def of_index(self, index: Tensor) -> _Rows:
        """Those of some numbers."""
        every = (self.weight, self.value, self.mask, self.slope)
        return _Rows(*(one.index_select(0, index) for one in every))

    def costs(self, diagonal: Tensor) -> Tensor:
        """(O, I): by how much E rises if a kept weight goes; infinite for others."""
        cost = (self.value * diagonal).add_(self.slope, alpha=2).mul_(self.value)
        return torch.where(self.mask, cost, torch.inf)

    def returns(self, diagonal: Tensor, *, fixed: bool) -> Tensor:
        """(O, I): by how much E changes if a removed weight comes back; infinite for others, and for zeros."""
        if fixed:
            change = (self.weight * diagonal).sub_(self.slope, alpha=2).mul_(self.weight)
        else:
            change = self.slope.square().div_(diagonal).neg_()
        return torch.where(self.mask | (self.weight == 0) | (diagonal == 0), torch.inf, change)


def _exchanged(rows: _Rows, hessian: Tensor, pattern: Pattern, *, fixed: bool) -> tuple[Tensor, Tensor]:
    """Values and mask (O, I) of rows after all exchanges."""
    value, mask = rows.value.clone(), rows.mask.clone()
    numbers = torch.arange(len(value), device=value.device)
    for _ in range(_ROUNDS):
        kept, gone = _short_list(rows, hessian.diagonal(), pattern, fixed=fixed)
        made = _Lists(rows, kept, gone, hessian, fixed=fixed).exchange()
        columns = torch.cat((kept.flatten(1), gone.flatten(1)), dim=1)
        changed = made.any(dim=1).nonzero()[:, 0]
        if not len(changed):
            break
        rows, columns, made, numbers = rows.of_index(changed), columns[changed], made[changed], numbers[changed]
        # Added up, because a column may be listed twice: a row may have fewer weights than a list.
        moved = torch.zeros_like(rows.mask, dtype=torch.int8).scatter_add_(1, columns, (made != 0).char())
        rows.mask ^= moved.bool()
        rows.value.scatter_add_(1, columns, made).mul_(rows.mask)
        rows.slope -= F.embedding_bag(columns, hessian, per_sample_weights=made, mode="sum")
        value[numbers], mask[numbers] = rows.value, rows.mask
    return value, mask


def _short_list(rows: _Rows, diagonal: Tensor, pattern: Pattern, *, fixed: bool) -> tuple[Tensor, Tensor]:
    """Columns of kept weights (O, G, K) and of removed ones (O, G, R); some may be neither, where weights were zero."""
    costs, returns = rows.costs(diagonal), rows.returns(diagonal, fixed=fixed)
    if not isinstance(pattern, NM):
        size = min(_LISTED, costs.shape[1])
        return tuple(one.topk(size, dim=1, largest=False).indices[:, None] for one in (costs, returns))  # type: ignore[return-value]
    best = costs.unflatten(1, (-1, pattern.m)).amin(dim=2) + returns.unflatten(1, (-1, pattern.m)).amin(dim=2)
    size = min(max(2 * _LISTED // pattern.m, 1), best.shape[1])
    first = best.topk(size, dim=1, largest=False).indices * pattern.m
    columns = first[:, :, None] + torch.arange(pattern.m, device=first.device)
    kept_first = rows.mask.gather(1, columns.flatten(1)).view_as(columns).byte().argsort(dim=2, descending=True)
    kept, gone = columns.gather(2, kept_first).split((pattern.n, pattern.m - pattern.n), dim=2)
    return kept, gone


class _Lists:
    """The short lists of rows, in which each weight can be exchanged once.

    Args:
        rows: O of them.
        kept: (O, G, K) columns.
        gone: (O, G, R) columns.
        hessian: (I, I).
        fixed: whether a weight comes back with the value that it had.
    """

    def __init__(self, rows: _Rows, kept: Tensor, gone: Tensor, hessian: Tensor, *, fixed: bool) -> None:
        self._fixed, self._hessian = fixed, hessian
        self._rows = torch.arange(len(kept), device=kept.device)
        self._columns = torch.cat((kept.flatten(1), gone.flatten(1)), dim=1)
        self._slope = rows.slope.gather(1, self._columns)
        self._kept = kept[0].numel()
        self._pairs = hessian[kept[..., None], gone[:, :, None]]  # H_ij, (O, G, K, R)
        diagonal = hessian.diagonal()
        self._value, self._kept_diagonal = rows.value.gather(1, kept.flatten(1)).view_as(kept), diagonal[kept]
        self._weight, self._gone_diagonal = rows.weight.gather(1, gone.flatten(1)).view_as(gone), diagonal[gone]
        may_go = rows.mask.gather(1, kept.flatten(1)).view_as(kept)
        back = rows.mask.gather(1, gone.flatten(1)).view_as(gone).logical_not_()
        may_return = back & (self._weight != 0) & (self._gone_diagonal != 0)
        # Infinite for what may not be exchanged, or has been.
        self._barred_kept = torch.zeros_like(self._value).masked_fill_(~may_go, torch.inf)
        self._barred_gone = torch.zeros_like(self._weight).masked_fill_(~may_return, torch.inf)
        self._error = ((rows.weight - rows.value) * rows.slope).sum(dim=1)

    def exchange(self) -> Tensor:
        """Make exchanges, the best first; returns what each listed weight's value changes by, (O, L)."""
        made = torch.zeros_like(self._slope)
        for _ in range(self._value.shape[1] * min(self._value.shape[2], self._weight.shape[2])):
            change, at = self._changes().flatten(1).min(dim=1)
            good = change < -_LEAST_GAIN * self._error
            self._make(at, good, made)
            self._error = torch.where(good, self._error + change, self._error)
            if good.sum() <= _FEW * len(good):
                break
        return made

    def _changes(self) -> Tensor:
        """By how much each exchange would change E, (O, G, K, R)."""
        slope_kept = self._slope[:, : self._kept].view_as(self._value)
        slope_gone = self._slope[:, self._kept :].view_as(self._weight)
        cost = (self._value * self._kept_diagonal + 2 * slope_kept) * self._value + self._barred_kept
        if self._fixed:
            back = (self._weight * self._gone_diagonal - 2 * slope_gone) * self._weight + self._barred_gone
            both = (-2 * self._value)[..., None] * self._weight[:, :, None] * self._pairs
            return both.add_(cost[..., None]).add_(back[:, :, None])
        slope = (self._value[..., None] * self._pairs).add_(slope_gone[:, :, None])
        gain = slope.square_().div_(self._gone_diagonal[:, :, None])
        return (cost[..., None] - gain).add_(self._barred_gone[:, :, None])

    def _make(self, at: Tensor, good: Tensor, made: Tensor) -> None:
        """Make the exchange `at` (O,) of the rows that are `good` (O,) bool, and note it in `made` (O, L)."""
        kept, gone = self._value.shape[2], self._weight.shape[2]
        group, i, j = at // (kept * gone), at % (kept * gone) // gone, at % gone
        rows, leaving, coming = self._rows, group * kept + i, self._kept + group * gone + j
        value = self._value[rows, group, i]
        back = self._weight[rows, group, j]
        if not self._fixed:
            slope = self._slope[rows, coming] + value * self._pairs[rows, group, i, j]
            back = slope / self._gone_diagonal[rows, group, j]
        value, back = (torch.where(good, one, 0.0) for one in (value, back))
        made[rows, leaving] -= value
        made[rows, coming] += back
        for change, place in ((value, leaving), (-back, coming)):
            column = self._columns[rows, place][:, None]
            self._slope.addcmul_(change[:, None], self._hessian[column, self._columns])
        barred = torch.where(good, torch.inf, 0.0)
        self._barred_kept[rows, group, i] += barred
        self._barred_gone[rows, group, j] += barred
