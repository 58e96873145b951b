"""The operator's work besides GEMMs, in plain torch: form W', expand a packed W, reduce or compress a gradient.

The other back-ends (`native`, `triton`) have functions with the same names and signatures; the operator selects a
module. Rows are processed in pieces of one group, which need no gather of A, and which fit a CPU's cache.

Shapes: O output features, I input features, R row groups, K directions. W (O, I), A (R K, I), B (O, K).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spp.ops.packed import PackedWeight, Weight, require_all_values, unpack, unpack_mask, unpack_rows
from spp.ops.reference import mixture

_PIECE_ROWS, _GPU_PIECE = 128, 2**24  # the second is in entries


def effective_weight(weight: Weight, A: Tensor, B: Tensor, out: Tensor, *, with_base: bool) -> None:
    """Write c W + W * (A[g] B) to `out`, rounded once to its dtype; +0.0 where W is zero. c = 1 gives the merge's bits.

    Args:
        weight: (O, I).
        A: (R K, I) in `reference.wide_dtype`, which the computation is in.
        B: (O, K) in the same dtype, multiplied by the scale.
        out: (O, I), contiguous.
        with_base: whether c is 1; else it is 0.
    """
    if isinstance(weight, PackedWeight):
        require_all_values(weight)  # `unpack_rows` checks the rest, row by row
    directions = _by_group(A, B)
    for group, rows in pieces(len(weight), len(directions), 0, len(weight), _most_rows(out)):
        part = _rows(weight, rows).to(A.dtype)
        delta = part * mixture(directions[group].unbind(), B[rows])
        total = delta.add_(part) if with_base else delta
        out[rows] = total.masked_fill_(part == 0, 0.0)


def expand(weight: PackedWeight, out: Tensor) -> None:
    """Write W to `out` (O, I): with the same bits if the dtypes are the same, else rounded once."""
    out.copy_(unpack(weight))


def add_factor_gradients(G: Tensor, first: int, weight: Weight, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor) -> None:
    """For P = G * W over the rows of G, 0 where W is zero, and d = K g(i) + k:

        dA[d] += P[i] * B[i, k]        dB[i, k] = sum_j P[i, j] A[d, j]

    Args:
        G: (n, I), the gradient of rows `first` to `first` + n of W'; it may be overwritten.
        first: index of the first of these rows.
        weight: (O, I).
        A, B: (R K, I) and (O, K) in the dtype of dA and dB.
        dA, dB: as A and B, changed in place.
    """
    directions, sums = _by_group(A, B), _by_group(dA, B)
    for group, rows in pieces(len(weight), len(directions), first, first + len(G), _most_rows(G)):
        part = _rows(weight, rows)
        # Zeros of W contribute nothing, even where G is not finite.
        P = G[rows.start - first : rows.stop - first].to(dA.dtype).mul_(part).masked_fill_(part == 0, 0.0)
        torch.mm(P, directions[group].T, out=dB[rows])
        sums[group].addmm_(B[rows].T, P)


def compress(G: Tensor, first: int, weight: PackedWeight) -> None:
    """Write the entries of G at which W has values to these values, in their dtype; the inverse of `expand`.

    Args:
        G: (n, I), contiguous: new rows `first` to `first` + n of W.
        first: index of the first of these rows.
        weight: (O, I) with sound bits and offsets, which are not checked; its values are written.
    """
    rows = PackedWeight(weight.values, weight.bitmask[first : first + len(G)], weight.row_offsets, weight.in_features)
    start, end = (int(weight.row_offsets[row]) for row in (first, first + len(G)))
    weight.values[start:end] = G[unpack_mask(rows)]


def _by_group(A: Tensor, B: Tensor) -> Tensor:
    """A view of A, (R, K, I)."""
    return A.view(-1, B.shape[1], A.shape[1])


def _most_rows(matrix: Tensor) -> int:
    """Most rows of a piece: those that fit a CPU's cache, or that make a GPU's launches worthwhile."""
    return _PIECE_ROWS if matrix.device.type == "cpu" else max(_GPU_PIECE // max(matrix.shape[1], 1), _PIECE_ROWS)


def pieces(out_features: int, groups: int, first: int, last: int, most: int) -> Iterator[tuple[int, slice]]:
    """The rows [first, last) in order, in pieces (group, rows) of up to `most` rows of one group."""
    start = first
    while start < last:
        group = start * groups // out_features
        # The first i with floor(i * R / O) > group is ceil((group + 1) * O / R).
        group_end = -(-(group + 1) * out_features // groups)
        rows = slice(start, min(start + most, group_end, last))
        yield group, rows
        start = rows.stop


def _rows(weight: Weight, rows: slice) -> Tensor:
    return weight[rows].detach() if isinstance(weight, Tensor) else unpack_rows(weight, rows.start, rows.stop)
