# pyright: reportMissingImports=false, reportOptionalMemberAccess=false, reportInvalidTypeForm=false
"""Our Triton kernels for NVIDIA GPUs: form W', expand a packed W, reduce or compress a gradient.

Every function here has the signature and the result of the one with its name in `spp.ops.torch_kernels`. None waits for
the GPU, so a damaged packed weight raises no error: it gives wrong numbers, but nothing is read outside its values.

A program processes a piece, which is some rows of one group, and a block of columns as (words, 32). If W is packed, the
index of a value is its row's offset + the bits set in earlier words of the row + the lower bits set in its own word.
No sum uses atomics: the same arguments give the same bits.

With TRITON_INTERPRET=1, set before the import, everything runs on the CPU, slowly.

Shapes: O output features, I input features, R row groups, K directions. W (O, I), A (R K, I), B (O, K).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spp.errors import SppError
from spp.ops.dtypes import KERNEL_DTYPE_NAMES, KERNEL_DTYPES
from spp.ops.packed import PackedWeight, Weight, word_count

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


class _Tile(NamedTuple):
    """The size of a program: rows of a group, words of a row (32 columns each), and the number of warps."""

    rows: int
    words: int
    warps: int


# The fastest of ten choices on an H200 at 11008 x 4096, dense and packed.
_FORM, _REDUCE = _Tile(8, 32, 4), _Tile(16, 128, 8)


def _jit(function: Callable[..., Any]) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _popcount_asm(word):
    return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@_jit
def _popcount_arithmetic(word):
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return (word + (word >> 16)) & 0x3F


_INTERPRETED = triton is not None and not isinstance(_popcount_asm, triton.JITFunction)
_popcount = _popcount_arithmetic if _INTERPRETED else _popcount_asm  # the interpreter does not support assembly


@_jit
def _piece(pieces, first_group, first, last, out_features, all_groups, ROWS: tl.constexpr):
    """This program's group, and its rows [start, stop) among [first, last); there may be none. All of it is int64."""
    index = tl.program_id(0).to(tl.int64)
    group = first_group + index // pieces
    # The first i with floor(i * R / O) >= group is ceil(group * O / R).
    start = tl.maximum((group * out_features + all_groups - 1) // all_groups, first) + index % pieces * ROWS
    group_end = ((group + 1) * out_features + all_groups - 1) // all_groups
    return group, start, tl.minimum(tl.minimum(start + ROWS, group_end), last)


@_jit
def _columns(WORDS: tl.constexpr):
    """This program's columns, (WORDS, 32)."""
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    return word[:, None] * 32 + tl.arange(0, 32)[None, :]


# fmt: off
@_jit
def _entries(
    values, bitmask, row_offsets, nonzeros, row_stride, column_stride, in_features, row,
    WORDS: tl.constexpr, ROW_WORDS: tl.constexpr,
):
    """W[row, this program's columns], (WORDS, 32), as stored; zeros where a packed W has no value."""
    places, present = _places(
        bitmask, row_offsets, nonzeros, row_stride, column_stride, in_features, row, WORDS, ROW_WORDS
    )
    return tl.load(values + places, mask=present, other=0)


@_jit
def _places(
    bitmask, row_offsets, nonzeros, row_stride, column_stride, in_features, row,
    WORDS: tl.constexpr, ROW_WORDS: tl.constexpr,
):
    """Where the entries of `_entries` are in `values`, and which of them are there at all, (WORDS, 32) each."""
    columns = _columns(WORDS)
    present = columns < in_features
    if bitmask is None:
        places = row * row_stride + columns.to(tl.int64) * column_stride
    else:
        words = (in_features + 31) // 32
        line = bitmask + row * words
        first = tl.program_id(1) * WORDS
        every = tl.arange(0, ROW_WORDS)
        before = tl.sum(_popcount(tl.load(line + every, mask=every < first, other=0)))
        own = first + tl.arange(0, WORDS)
        word = tl.load(line + own, mask=own < words, other=0)
        count = _popcount(word)
        bit = tl.arange(0, 32)[None, :]
        lower = word[:, None] & (0x7FFFFFFF >> (31 - bit))
        index = (before + tl.cumsum(count) - count)[:, None] + _popcount(lower)
        start = tl.load(row_offsets + row)
        # Never outside the values, whatever the bits and offsets are.
        room = tl.where(start >= 0, tl.maximum(tl.minimum(nonzeros - start, in_features), 0), 0).to(tl.int32)
        present &= ((word[:, None] >> bit) & 1 != 0) & (index < room)
        places = start + index
    return places, present


@_jit
def _gather(
    G, values, bitmask, row_offsets, nonzeros, row_stride, column_stride,
    pieces, first_group, first, last, out_features, in_features, all_groups,
    ROWS: tl.constexpr, WORDS: tl.constexpr, ROW_WORDS: tl.constexpr,
):
    """The rows of G at the entries that a packed W has, as its values."""
    _, start, stop = _piece(pieces, first_group, first, last, out_features, all_groups, ROWS)
    for row in range(start, stop):
        places, present = _places(
            bitmask, row_offsets, nonzeros, row_stride, column_stride, in_features, row, WORDS, ROW_WORDS
        )
        g = tl.load(G + (row - first) * in_features + _columns(WORDS), mask=present, other=0)
        tl.store(values + places, g.to(values.dtype.element_ty), mask=present)


@_jit
def _form(
    out, values, bitmask, row_offsets, nonzeros, row_stride, column_stride, A, B,
    pieces, first_group, first, last, out_features, in_features, all_groups,
    WITH_BASE: tl.constexpr, DIRECTIONS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
):
    """c W + W * (A[g] B); if there is no A, W itself, with the same bits if the dtypes are the same."""
    group, start, stop = _piece(pieces, first_group, first, last, out_features, all_groups, ROWS)
    columns = _columns(WORDS)
    inside = columns < in_features
    directions = A if A is None else A + group * DIRECTIONS * in_features + columns
    a = 0.0 if A is None else tl.load(directions, mask=inside, other=0)
    for row in range(start, stop):
        w = _entries(
            values, bitmask, row_offsets, nonzeros, row_stride, column_stride, in_features, row, WORDS, ROW_WORDS
        )
        if A is not None:
            w = w.to(tl.float32)
            multiplier = a * tl.load(B + row * DIRECTIONS)
            # Read again from the cache: there are too few registers for all of them.
            for k in tl.static_range(1, DIRECTIONS):  # pyright: ignore[reportGeneralTypeIssues]
                other = tl.load(directions + k * in_features, mask=inside, other=0)
                multiplier += other * tl.load(B + row * DIRECTIONS + k)
            delta = w * multiplier
            w = tl.where(w == 0, 0.0, delta + w if WITH_BASE else delta)
        tl.store(out + row * in_features + columns, w.to(out.dtype.element_ty), mask=inside)


@_jit
def _reduce(
    G, values, bitmask, row_offsets, nonzeros, row_stride, column_stride, A, B, dA, dB,
    pieces, first_group, first, last, out_features, in_features, all_groups,
    DIRECTIONS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, ROW_WORDS: tl.constexpr,
):
    """For P = G * W: sum_i P[i] * B[i, k] of a piece into dA, (K, I), sum_j P[i, j] * A[K g + k, j] of a block into dB.

    Tensors over directions are padded to `PADDED` of them, a power of two.
    """
    group, start, stop = _piece(pieces, first_group, first, last, out_features, all_groups, ROWS)
    columns = _columns(WORDS)
    inside = columns < in_features
    k = tl.arange(0, PADDED)
    places = k[:, None, None] * in_features + columns[None, :, :]
    present = (k < DIRECTIONS)[:, None, None] & inside[None, :, :]
    a = tl.load(A + group * DIRECTIONS * in_features + places, mask=present, other=0)
    total = tl.zeros((PADDED, WORDS, 32), tl.float32)
    for row in range(start, stop):
        w = _entries(
            values, bitmask, row_offsets, nonzeros, row_stride, column_stride, in_features, row, WORDS, ROW_WORDS
        ).to(tl.float32)
        g = tl.load(G + (row - first) * in_features + columns, mask=inside, other=0).to(tl.float32)
        # Zeros of W contribute nothing, even where G is not finite.
        p = tl.where(w == 0, 0.0, g * w)[None, :, :]
        total += p * tl.load(B + row * DIRECTIONS + k, mask=k < DIRECTIONS, other=0)[:, None, None]
        sums = tl.sum(tl.sum(p * a, axis=2), axis=1)
        line = dB + (row - first) * DIRECTIONS * tl.num_programs(1)
        tl.store(line + k * tl.num_programs(1) + tl.program_id(1), sums, mask=k < DIRECTIONS)
    tl.store(dA + tl.program_id(0).to(tl.int64) * DIRECTIONS * in_features + places, total, mask=present)
# fmt: on


def why_not(*tensors: Tensor | PackedWeight) -> str | None:
    """Why the kernels cannot compute with these tensors, as a phrase; None if they can."""
    if triton is None:
        return "triton is not installed"
    if torch.version.hip:
        return "it is written for NVIDIA GPUs"
    for tensor in tensors:
        if not (tensor.device.type == "cuda" or _INTERPRETED and tensor.device.type == "cpu"):
            return f"it runs on a GPU, and a tensor is on {tensor.device}"
        if tensor.device != tensors[0].device:
            return f"the tensors are on {tensors[0].device} and {tensor.device}"
        if tensor.dtype not in KERNEL_DTYPES:
            return f"it computes in {KERNEL_DTYPE_NAMES}, and a tensor is {tensor.dtype}"
    return None


def effective_weight(weight: Weight, A: Tensor, B: Tensor, out: Tensor, *, with_base: bool) -> None:
    """As `torch_kernels.effective_weight`, in fp32; a dense weight may have any strides.

    Raises:
        SppError: a packed weight whose tensors do not fit each other.
    """
    _form_rows(weight, A, B, out, with_base)


def expand(weight: PackedWeight, out: Tensor) -> None:
    """As `torch_kernels.expand`.

    Raises:
        SppError: a packed weight whose tensors do not fit each other.
    """
    _form_rows(weight, None, None, out, True)


def add_factor_gradients(G: Tensor, first: int, weight: Weight, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor) -> None:
    """As `torch_kernels.add_factor_gradients`, in fp32; the order of all sums is fixed.

    Raises:
        SppError: a packed weight whose tensors do not fit each other.
    """
    described = _described(weight, G)
    (out_features, in_features), last = weight.shape, first + len(G)
    _require(G.shape[1:] == (in_features,) and first >= 0 and last <= out_features and G.is_contiguous(), "G", G)
    if not G.numel():
        return
    directions = B.shape[1]
    padded = triton.next_power_of_2(directions)
    tile = _REDUCE._replace(words=max(_REDUCE.words // padded, 1))
    plan = _plan(tuple(weight.shape), len(A) // directions, first, last, tile)
    dA_of_pieces = torch.empty(plan.groups, plan.pieces, directions, in_features, device=G.device)
    dB_of_blocks = torch.empty(len(G), directions, plan.blocks, device=G.device)
    arguments = {"DIRECTIONS": directions, "PADDED": padded, **described, **plan.arguments}
    with torch.cuda.device_of(G):
        _reduce[plan.groups * plan.pieces, plan.blocks](
            G=G, A=_factor(A), B=_factor(B), dA=dA_of_pieces, dB=dB_of_blocks, **arguments
        )
    sums = dA.view(-1, directions, in_features)
    sums[plan.first_group : plan.first_group + plan.groups] += dA_of_pieces.sum(dim=1)
    dB[first:last] = dB_of_blocks.sum(dim=2)


def compress(G: Tensor, first: int, weight: PackedWeight) -> None:
    """As `torch_kernels.compress`.

    Raises:
        SppError: a packed weight whose tensors do not fit each other.
    """
    described, last = _described(weight, G), first + len(G)
    fits = G.shape[1:] == (weight.in_features,) and first >= 0 and last <= len(weight) and G.is_contiguous()
    _require(fits, "G", G)
    if not G.numel():
        return
    plan = _plan(weight.shape, 1, first, last, _FORM)
    with torch.cuda.device_of(G):
        _gather[plan.groups * plan.pieces, plan.blocks](G=G, **described, **plan.arguments)


def _form_rows(weight: Weight, A: Tensor | None, B: Tensor | None, out: Tensor, with_base: bool) -> None:
    described = _described(weight, out)
    _require(out.shape == tuple(weight.shape) and out.is_contiguous(), "out", out)
    if not out.numel():
        return
    directions = 1 if B is None else B.shape[1]
    plan = _plan(tuple(weight.shape), 1 if A is None else len(A) // directions, 0, len(weight), _FORM)
    factors = {"A": _factor(A), "B": _factor(B), "DIRECTIONS": directions}
    arguments = {"out": out, "WITH_BASE": with_base, **factors, **described, **plan.arguments}
    with torch.cuda.device_of(out):
        _form[plan.groups * plan.pieces, plan.blocks](**arguments)


class _Plan(NamedTuple):
    """The grid of programs: a range of groups, the most pieces of a group, and the number of column blocks."""

    first_group: int
    groups: int
    pieces: int
    blocks: int
    arguments: dict[str, int]


@lru_cache
def _plan(shape: tuple[int, int], groups: int, first: int, last: int, tile: _Tile) -> _Plan:
    """The grid for the rows [first, last) of a weight."""
    out_features, in_features = shape
    words = word_count(in_features)
    first_group, last_group = (row * groups // out_features for row in (first, last - 1))
    largest_group = -(-out_features // groups)
    pieces = -(-min(largest_group, last - first) // tile.rows)
    words_at_once = min(tile.words, triton.next_power_of_2(words))
    arguments = {
        "pieces": pieces,
        "first_group": first_group,
        "first": first,
        "last": last,
        "out_features": out_features,
        "in_features": in_features,
        "all_groups": groups,
        "ROWS": tile.rows,
        "WORDS": words_at_once,
        "ROW_WORDS": triton.next_power_of_2(words),
        "num_warps": tile.warps,
        "enable_fp_fusion": False,  # round each product and sum, as in the reference
    }
    return _Plan(first_group, last_group + 1 - first_group, pieces, -(-words // words_at_once), arguments)


def _described(weight: Weight, other: Tensor) -> dict[str, Any]:
    """The weight as arguments of the kernels, checked as far as possible without waiting for the GPU."""
    if reason := why_not(weight, other):
        raise ValueError(f"the back-end triton cannot be used: {reason}")
    if isinstance(weight, Tensor):
        strides = {"row_stride": weight.stride(0), "column_stride": weight.stride(1)}
        return {"values": weight, "bitmask": None, "row_offsets": None, "nonzeros": 0, **strides}
    tensors = (weight.values, weight.bitmask, weight.row_offsets)
    lengths = weight.bitmask.shape == (len(weight), word_count(weight.in_features))
    offsets = weight.row_offsets.shape == (len(weight) + 1,) and weight.row_offsets.dtype == torch.int64
    alike = all(tensor.is_contiguous() and tensor.device == weight.device for tensor in tensors)
    if not (lengths and offsets and alike and weight.bitmask.dtype == torch.int32):
        raise SppError("a packed weight's bitmask or row offsets have another length, dtype or device than they should")
    named = dict(zip(("values", "bitmask", "row_offsets"), tensors, strict=True))
    return {**named, "nonzeros": len(weight.values), "row_stride": 0, "column_stride": 0}


def _factor(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.detach().to(torch.float32).contiguous()


def _require(holds: bool, name: str, tensor: Tensor) -> None:
    if not holds:
        found = (tuple(tensor.shape), tensor.stride(), tensor.dtype)
        raise ValueError(f"{name} does not fit the weight, or is not contiguous: {found}")
