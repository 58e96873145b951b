"""Boolean masks of the k highest of n scores: exact counts, ties by position, without sorting.

Shapes: O output features, I input features, M members of a group, K groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


# Groups up to this size are ranked by M (M - 1) / 2 comparisons, longer ones are searched for a threshold.
_SMALL_GROUP = 16
# Rows longer than this are searched one at a time, starting from a sample of their values.
_LONG_ROW = 2**17
_SAMPLE = 2**13
# Scores processed at once: on a CPU they fit its cache, on a GPU a matrix takes few kernel launches.
_PART, _GPU_PART = 2**19, 2**26


def keep_all_but_lowest(scores: Tensor, count: int) -> Tensor:
    """A mask that is False at the `count` lowest scores along the last dimension; equal to `_reference`.

    Scratch memory besides the result: a few times `_PART` entries, and for long rows a tenth of a row.

    Args:
        scores: (..., I), any float dtype; a NaN counts as the highest score.
        count: scores of each row that are not kept.

    Returns:
        (..., I) bool; of equal scores, the first ones are not kept.
    """
    keep = scores.isnan().contiguous()  # the mask of transposed scores is not
    has_nan, size = bool(keep.any()), scores.shape[-1]
    if count in (0, size):
        return keep.fill_(count == 0)
    rows, kept = scores.reshape(-1, size), keep.view(-1, size)
    at_once = 1 if size > _LONG_ROW else rows_at_once(scores)
    for part, out in zip(rows.split(at_once), kept.split(at_once), strict=True):
        if has_nan:  # comparisons do not order NaN
            out.copy_(_reference(part, count))
        elif size <= _SMALL_GROUP:
            out.copy_(keep_in_groups(part.T.contiguous(), count).T)
        elif size <= _LONG_ROW:
            out.copy_(_keep_in_rows(part, count))
        else:
            _keep_in_long_row(part[0], count, out[0])
    return keep


def rows_at_once(matrix: Tensor) -> int:
    """How many rows of a matrix (..., I) to process at once."""
    return max((_GPU_PART if matrix.is_cuda else _PART) // max(matrix.shape[-1], 1), 1)


def keep_in_groups(groups: Tensor, removed: int) -> Tensor:
    """A mask that is False at the `removed` lowest scores of each group; groups run along the first dimension.

    Small groups are ranked by comparing their members in pairs: member j has the rank
    #{k < j: s_k <= s_j} + #{k > j: s_k < s_j}, as in a stable sort. Each comparison takes two contiguous rows (K,).

    Args:
        groups: (M, K), any float dtype, without NaN.
        removed: how many scores of each group are not kept.

    Returns:
        (M, K) bool.
    """
    if len(groups) > _SMALL_GROUP:
        return keep_all_but_lowest(groups.T, removed).T
    rank = groups.new_ones(len(groups), 1).cumsum(dim=0).sub_(1).char().repeat(1, groups.shape[1])
    for distance in range(1, len(groups)):
        # Where the earlier member is the higher one, it moves up by one, and the later one down.
        higher = (groups[:-distance] > groups[distance:]).view(rank.dtype)
        rank[:-distance] += higher
        rank[distance:] -= higher
    return rank >= removed


def _keep_in_rows(rows: Tensor, count: int) -> Tensor:
    """The mask of rows (O, I): each row has a threshold, and of the scores equal to it the first ones are not kept."""
    limit = rows.kthvalue(count, dim=-1, keepdim=True).values
    keep = rows > limit
    missing = rows.shape[-1] - count - keep.sum(dim=-1, keepdim=True)
    if missing.any():
        ties = rows == limit
        place = ties.cumsum(dim=-1)
        keep |= ties & (place > place[:, -1:] - missing)
    return keep


def _keep_in_long_row(row: Tensor, count: int, out: Tensor) -> None:
    """Write the mask of one row (I,), part by part."""
    limit = _kth_lowest(row, count)
    parts = row.split(_GPU_PART if row.is_cuda else _PART)
    ties_to_go = count - sum(int((part < limit).sum()) for part in parts)
    for part, kept in zip(parts, out.split(len(parts[0])), strict=True):
        place = (part == limit).cumsum(dim=-1)
        kept.copy_((part > limit) | ((part == limit) & (place > ties_to_go)))
        ties_to_go = max(ties_to_go - int(place[-1]), 0)


def _kth_lowest(values: Tensor, count: int) -> Tensor:
    """The `count`-th lowest of values (K,), a scalar.

    A sorted sample gives two values that almost always enclose it; then only the values between them are searched.
    """
    sample = values[:: max(len(values) // _SAMPLE, 1)].sort().values
    # Four standard deviations, at most, of the number of sampled values below the `count`-th lowest.
    place, slack = count * len(sample) // len(values), 2 * int(len(sample) ** 0.5)
    low, high = sample[max(place - slack, 0)], sample[min(place + slack, len(sample) - 1)]
    parts = values.split(_GPU_PART if values.is_cuda else _PART)
    below = sum(int((part < low).sum()) for part in parts)
    between = [part[(part >= low) & (part <= high)] for part in parts]
    found = sum(map(len, between))
    if not below < count <= below + found:
        return values.kthvalue(count).values
    candidates = values.new_empty(found)
    for part, room in zip(between, candidates.split([len(part) for part in between]), strict=True):
        room.copy_(part)
    return candidates.kthvalue(count - below).values


def _reference(scores: Tensor, count: int) -> Tensor:
    """The definition of `keep_all_but_lowest`: False at the first `count` places of a stable sort, NaN last."""
    order = scores.argsort(dim=-1, stable=True)
    everything = order >= 0
    return everything.scatter(-1, order[..., :count], False)
