"""A sparse weight without its zeros (values, one bit per entry, row offsets), and the readable reference for it.

One layout for every pattern: for bf16 it takes 0.564 of the dense weight at 50 % sparsity, 0.314 at 75 %. Packing keeps
every bit of the non-zeros (NaN payloads and denormals too); zeros of either sign come back as +0.0.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spp.errors import SppError
from spp.ops.dtypes import FLOATS, KERNEL_DTYPE_NAMES

WORTH_PACKING = 0.3
"""Sparsity from which packing saves more than it costs to compute with."""


WORD_BITS = 32


class DamagedWeightError(SppError, ValueError):
    """The three tensors of a packed weight contradict each other."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight (O, I) without its zeros.

    Attributes:
        values: (number of non-zeros,) floats, row by row.
        bitmask: (O, ceil(I / 32)) int32; bit b of word w of a row is set where column 32 w + b has a value.
        row_offsets: (O + 1,) int64, the index of each row's first value; the last entry is the number of values.
        in_features: I.
    """

    values: Tensor
    bitmask: Tensor
    row_offsets: Tensor
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return len(self.bitmask), self.in_features

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Device of all three tensors."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of all three tensors."""
        return self.values.nbytes + self.bitmask.nbytes + self.row_offsets.nbytes

    @property
    def requires_grad(self) -> bool:
        """Whether the values get a gradient."""
        return self.values.requires_grad

    def __len__(self) -> int:
        """O."""
        return len(self.bitmask)


Weight = Tensor | PackedWeight
"""A weight (O, I), dense or packed."""


def packed_bytes(nonzeros: int, out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """Bytes of a packed weight."""
    return nonzeros * dtype.itemsize + out_features * word_count(in_features) * 4 + (out_features + 1) * 8


def zero_share(weight: Tensor) -> float:
    """Share of a tensor's entries that are zeros of either sign."""
    return 1 - int((weight != 0).count_nonzero()) / weight.numel()


def word_count(in_features: int) -> int:
    """Words of the bitmask per row."""
    return -(-in_features // WORD_BITS)


def require_packable(weight: Tensor) -> None:
    """Check that a weight can be packed.

    Raises:
        ValueError: it is not a matrix, or not of a float dtype.
    """
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"only a matrix can be packed, and this tensor has the shape {tuple(weight.shape)}")
    if weight.dtype not in FLOATS:
        raise ValueError(f"a {weight.dtype} weight cannot be packed; convert it first ({KERNEL_DTYPE_NAMES})")


def pack(weight: Tensor) -> PackedWeight:
    """Pack a weight (O, I), leaving out its zeros.

    Raises:
        ValueError: see `require_packable`.
    """
    require_packable(weight)
    keep = weight != 0  # by value: NaN is kept, and -0.0 is a zero
    return PackedWeight(weight[keep], *pack_mask(keep), weight.shape[1])


def pack_mask(keep: Tensor) -> tuple[Tensor, Tensor]:
    """The bitmask and the row offsets of the entries that have a value, (O, I) bool."""
    out_features, in_features = keep.shape
    bits = torch.zeros(out_features, word_count(in_features) * WORD_BITS, dtype=torch.int64, device=keep.device)
    bits[:, :in_features] = keep
    places = torch.arange(WORD_BITS, device=keep.device)
    words = (bits.view(out_features, -1, WORD_BITS) << places).sum(dim=-1)
    row_offsets = torch.zeros(out_features + 1, dtype=torch.int64, device=keep.device)
    row_offsets[1:] = keep.sum(dim=1).cumsum(dim=0)
    return _as_int32(words), row_offsets


def unpack(packed: PackedWeight) -> Tensor:
    """The dense weight (O, I), with the bits that were packed and +0.0 elsewhere.

    Raises:
        DamagedWeightError: bitmask, row offsets and values do not fit together.
    """
    require_layout(packed)
    keep = unpack_mask(packed)
    if found := next(_problems_of_values(packed, keep), None):
        raise DamagedWeightError(f"a packed weight is damaged: {found}")
    weight = torch.zeros(packed.shape, dtype=packed.dtype, device=packed.device)
    # As integers: copying floats may change a signalling NaN.
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[packed.dtype.itemsize]
    weight.view(kind)[keep] = packed.values.view(kind)
    return weight


def unpack_rows(packed: PackedWeight, first: int, last: int) -> Tensor:
    """The dense rows [first, last), (last - first, I). It waits for the device, to read the values' offsets."""
    start, end = (int(packed.row_offsets[row]) for row in (first, last))
    offsets = packed.row_offsets[first : last + 1] - start
    return unpack(PackedWeight(packed.values[start:end], packed.bitmask[first:last], offsets, packed.in_features))


def unpack_mask(packed: PackedWeight) -> Tensor:
    """Which entries have a value, (O, I) bool."""
    return mask_of_bits(packed.bitmask, packed.in_features)


def mask_of_bits(bitmask: Tensor, in_features: int) -> Tensor:
    """Which entries have a value, (O, I) bool, of the bitmask of a packed weight."""
    places = torch.arange(WORD_BITS, dtype=torch.int32, device=bitmask.device)
    bits = (bitmask[..., None] >> places) & 1
    return bits.view(len(bitmask), -1)[:, :in_features].bool()


def problems(packed: PackedWeight) -> Iterator[str]:
    """The problems of a packed weight from an untrusted source: shapes, dtypes, and counts of every row."""
    unfit = list(problems_of_layout(packed))
    yield from unfit
    if not unfit:
        yield from _problems_of_values(packed, unpack_mask(packed))


def problems_of_layout(packed: PackedWeight) -> Iterator[str]:
    """What is wrong with dtypes and shapes, which are known without a look into the tensors."""
    tensors = (packed.values, packed.bitmask, packed.row_offsets)
    rows = len(packed.bitmask) if packed.bitmask.ndim else 0
    expected = (
        ("values", FLOATS, (packed.values.numel(),)),
        ("bitmask", (torch.int32,), (rows, word_count(packed.in_features))),
        ("row_offsets", (torch.int64,), (rows + 1,)),
    )
    for (name, dtypes, shape), tensor in zip(expected, tensors, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
            yield (
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, and {shape} {' or '.join(map(str, dtypes))}, "
                f"contiguous, is expected for a weight of {rows} x {packed.in_features}"
            )
        elif tensor.device != packed.values.device:
            yield f"{name} is on {tensor.device}, and values are on {packed.values.device}"


def require_layout(packed: PackedWeight) -> None:
    """Check dtypes and shapes of a packed weight, which costs a microsecond or two whatever its size.

    Raises:
        DamagedWeightError: names all problems.
    """
    values, bitmask, row_offsets = packed.values, packed.bitmask, packed.row_offsets
    rows = bitmask.shape[0] if bitmask.ndim == 2 else -1
    if (
        values.ndim == row_offsets.ndim == 1
        and row_offsets.shape[0] == rows + 1
        and bitmask.shape[1] == -(-packed.in_features // WORD_BITS)
        and bitmask.dtype is torch.int32
        and row_offsets.dtype is torch.int64
        and values.dtype in FLOATS
        and values.device == bitmask.device == row_offsets.device
    ):
        return
    raise DamagedWeightError("not a sound packed weight: " + "; ".join(problems_of_layout(packed)))


def require_all_values(packed: PackedWeight) -> None:
    """Check that the last row ends with the last value; it waits for the device.

    Raises:
        DamagedWeightError: it does not.
    """
    if (end := int(packed.row_offsets[-1])) != len(packed.values):
        raise DamagedWeightError(f"a packed weight is damaged: its rows end at value {end} of {len(packed.values)}")


def _problems_of_values(packed: PackedWeight, keep: Tensor) -> Iterator[str]:
    return problems_of_rows(packed.bitmask, packed.row_offsets, keep, len(packed.values), "values")


def problems_of_rows(bitmask: Tensor, row_offsets: Tensor, keep: Tensor, count: int, what: str) -> Iterator[str]:
    """What is wrong with the content of a bitmask and row offsets whose dtypes and shapes are sound.

    Args:
        bitmask, row_offsets: of a packed weight.
        keep: the bitmask's `mask_of_bits`.
        count: the number of values that there are.
        what: what they are called.
    """
    counts = keep.sum(dim=1)
    wrong = (row_offsets.diff() != counts).nonzero()
    if len(wrong):
        row = int(wrong[0])
        yield (
            f"{len(wrong)} rows have another number of bits than of {what}, e.g. row {row}: {int(counts[row])} bits, "
            f"{int(row_offsets[row + 1] - row_offsets[row])} {what}"
        )
    if int(row_offsets[0]) != 0 or int(row_offsets[-1]) != count:
        yield f"row_offsets run from {int(row_offsets[0])} to {int(row_offsets[-1])}, and there are {count} {what}"
    used = keep.shape[1] % WORD_BITS
    if used and bool((bitmask[:, -1] >> used).any()):
        yield "the bitmask has bits beyond the last column"


def require_sound(packed: PackedWeight, name: str) -> None:
    """Check the three tensors of a packed weight.

    Raises:
        DamagedWeightError: names all problems.
    """
    if found := list(problems(packed)):
        raise DamagedWeightError(f"{name}: not a sound packed weight: " + "; ".join(found))


def _as_int32(words: Tensor) -> Tensor:
    """The low 32 bits of int64 words, as int32."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
