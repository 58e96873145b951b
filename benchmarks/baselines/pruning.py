"""What the published pruning code does to one weight, written again in plain torch from its description.

Everything from statistics that are ready to the weight with its zeros: scores, mask, zeroing. Ties may be decided
otherwise than by us (topk), and the results are the same but for that. Patterns are ours: N of M are *kept*.

Shapes: O output features, I input features. The weight (O, I) is not changed; norm, mean and variance are (I,), the
Hessian is (I, I).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spp.patterns import NM, Pattern, Unstructured

_BLOCK = 128


def magnitude(weight: Tensor, pattern: Pattern) -> Tensor:
    """|W|; a stable sort of every row, or a loop over groups of columns."""
    return _zeroed(weight, _lowest(weight.abs(), pattern))


def magnitude_matrix(weight: Tensor, pattern: Pattern) -> Tensor:
    """|W|, compared over the whole matrix with a sort and a threshold; the same as `magnitude` for N:M."""
    if isinstance(pattern, NM):
        return magnitude(weight, pattern)
    scores = weight.abs()
    return _zeroed(weight, scores <= scores.flatten().sort().values[pattern.removed_of(scores.numel())])


def wanda(weight: Tensor, norm: Tensor, pattern: Pattern) -> Tensor:
    """|W| * ||X||; a stable sort of every row, or a loop over groups of columns."""
    return _zeroed(weight, _lowest(weight.abs() * norm, pattern))


def ria(weight: Tensor, norm: Tensor, pattern: Pattern) -> Tensor:
    """(|W| / row sum + |W| / column sum) * ||X||^0.5, masked as for Wanda."""
    size = weight.abs()
    relative = size / size.sum(dim=0) + size / size.sum(dim=1, keepdim=True)
    return _zeroed(weight, _lowest(relative * norm**0.5, pattern))


def sparsegpt(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """Invert by Cholesky, inverse, Cholesky; then blocks of 128 columns, each settled column by column."""
    hessian, weight = hessian.clone(), weight.float().clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, weight.shape[1], _BLOCK):
        end = min(start + _BLOCK, weight.shape[1])
        settled, errors = _settle(weight[:, start:end].clone(), factor[start:end, start:end], pattern)
        weight[:, start:end] = settled
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def _settle(block: Tensor, factor: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Settle the columns of a block (O, C); returns them and their scaled errors (O, C)."""
    settled, errors = torch.zeros_like(block), torch.zeros_like(block)
    gone = torch.zeros_like(block, dtype=torch.bool)
    if isinstance(pattern, Unstructured):
        scores = block**2 / factor.diagonal() ** 2
        gone = scores <= scores.flatten().sort().values[int(scores.numel() * pattern.sparsity)]
    for j in range(block.shape[1]):
        if isinstance(pattern, NM) and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            scores = block[:, group] ** 2 / factor.diagonal()[group] ** 2
            gone.scatter_(1, j + scores.topk(pattern.m - pattern.n, dim=1, largest=False).indices, True)
        column = block[:, j]
        kept = column.clone()
        kept[gone[:, j]] = 0
        settled[:, j] = kept
        error = (column - kept) / factor[j, j]
        block[:, j:] -= error[:, None] @ factor[j, None, j:]
        errors[:, j] = error
    return settled, errors


def dsnot(weight: Tensor, mask: Tensor, mean: Tensor, variance: Tensor, norm: Tensor, threshold: float) -> Tensor:
    """Exchange weights row by row (unstructured): full sorts of every row say in which order, at most 50 cycles.

    With our stop besides the published one: a row has settled when an exchange would make its error larger.

    Args:
        mask: (O, I) bool, what a criterion kept.
        threshold: rows whose expected error is below have settled.
    """
    change, mask = weight * mean, mask.clone()
    lost = change.masked_fill(mask, 0)
    error = lost.sum(dim=1, keepdim=True)
    grow_order = (lost / variance).sort(dim=1, stable=True).indices
    by_score = (weight.abs() * norm).masked_fill(~mask, torch.inf).sort(dim=1, stable=True).indices
    by_score = by_score[:, : int(mask[0].sum())]
    # Negative changes in ascending order of their scores, then positive ones in descending order.
    signs = change.gather(1, by_score) > 0
    numbers = torch.arange(by_score.shape[1], device=weight.device).expand_as(signs)
    order = torch.where(signs, 2 * by_score.shape[1] - numbers, numbers).argsort(dim=1)
    prune_order = by_score.gather(1, order)
    grown, pruned = ([torch.zeros_like(error, dtype=torch.int64) for _ in range(2)] for _ in range(2))
    active = torch.ones_like(error, dtype=torch.bool)
    for _ in range(50):
        if not active.any():
            break
        positive = error > 0
        grow = _in_turn(grow_order, ~positive, grown[1], grown[0])
        prune = _in_turn(prune_order, positive, pruned[0], pruned[1])
        for counts in (grown, pruned):
            counts[0] += positive
            counts[1] += ~positive
        after = error + change.gather(1, prune) - change.gather(1, grow)
        active &= (error.abs() > threshold) & (after.abs() < error.abs())
        mask.scatter_(1, prune, mask.gather(1, prune) & ~active)
        mask.scatter_(1, grow, mask.gather(1, grow) | active)
        error = torch.where(active, after, error)
    return _zeroed(weight, ~mask)


def _in_turn(order: Tensor, forwards: Tensor, from_start: Tensor, from_end: Tensor) -> Tensor:
    """The next position (O, 1) of every row of an order (O, C), from its start or from its end."""
    last = order.shape[1] - 1
    return order.gather(1, torch.where(forwards, from_start, last - from_end).clamp(0, last))


def _lowest(scores: Tensor, pattern: Pattern) -> Tensor:
    """True for the lowest scores of every row or group."""
    if isinstance(pattern, NM):
        return _lowest_of_groups(scores, pattern)
    order = scores.sort(dim=-1, stable=True).indices
    gone = torch.zeros_like(scores, dtype=torch.bool)
    return gone.scatter_(1, order[:, : pattern.removed_of(scores.shape[1])], True)


def _lowest_of_groups(scores: Tensor, pattern: NM) -> Tensor:
    gone = torch.zeros_like(scores, dtype=torch.bool)
    for start in range(0, scores.shape[1], pattern.m):
        group = scores[:, start : start + pattern.m].float()
        lowest = group.topk(pattern.m - pattern.n, dim=1, largest=False).indices
        gone.scatter_(1, start + lowest, True)
    return gone


def _zeroed(weight: Tensor, gone: Tensor) -> Tensor:
    result = weight.clone()
    result[gone] = 0
    return result
