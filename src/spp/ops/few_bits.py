"""A sparse weight whose survivors have a few bits each: the layout, and the readable reference for it.

    W[i, j] = codebook[code[i, j]] * scales[i, j // group] where the bitmask has a bit, and +0.0 elsewhere

Zeros are not stored: where they are is said by one bit per entry, as in `spp.ops.packed`. No code stands for zero, so a
survivor cannot become one, in any float dtype: |codebook| >= 1, so the product is at least as large as its scale, which
is a finite fp16 number other than zero, and bf16 and fp32 round no such number to zero.

A weight takes 1 + density * bits + 16 / group bits per entry, and 64 bits per row: 3.14 for 4 bits at 50 %.

Shapes: O output features, I input features, G = ceil(I / group) scales per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from spp.ops.packed import DamagedWeightError, mask_of_bits, pack_mask, problems_of_rows, word_count

Bits = Literal[8, 6, 5, 4, 3, 2]
Group = Literal[64, 128]
BITS: tuple[int, ...] = get_args(Bits)
GROUPS: tuple[int, ...] = get_args(Group)

PADDING = 64
"""Zero bytes after the last code, so that kernels may load 64 bytes at every code."""

MIDDLE = 128
"""A code of 8 bits stands for itself minus this; no survivor has this one."""

LARGEST = 65504.0
"""No |codebook * scale| exceeds it, so that all are finite in fp16, too."""

COLUMNS = 64
"""Columns that a kernel takes at once."""

_PART = 2**20  # codes at a time, whose bits fill whole bytes


@dataclass(frozen=True, eq=False)
class FewBitWeight:
    """A weight (O, I) without its zeros, whose other entries are codes. Made by `from_codes` or `from_tensors`.

    Attributes:
        codes: uint8; the codes of the survivors, row by row, `bits` bits each, the lowest bit of the first byte first,
            then `PADDING` zero bytes. A row begins at any bit.
        bitmask: (O, ceil(I / 32)) int32; bit b of word w of a row is set where column 32 w + b has a code.
        row_offsets: (O + 1,) int64, the index of each row's first code; the last entry is the number of codes.
        scales: (O, G) fp16, finite and not zero.
        codebook: (2^bits,) int8 without a zero, one for the whole matrix; (0,) for 8 bits, where a code c stands for
            c - `MIDDLE`.
        in_features: I.
        bits: 8, 6, 5, 4, 3 or 2.
        group: 64 or 128 columns have a scale in common.
        per_word: how many survivors there are in every 64 columns, where that is one number throughout (2:4 has 32);
            else 0. Kernels are faster where they know it. It follows from the bitmask.
    """

    codes: Tensor
    bitmask: Tensor
    row_offsets: Tensor
    scales: Tensor
    codebook: Tensor
    in_features: int
    bits: int
    group: int
    per_word: int

    @classmethod
    def from_codes(
        cls, indices: Tensor, mask: Tensor, scales: Tensor, codebook: Tensor | None, bits: int, group: int
    ) -> FewBitWeight:
        """Pack the codes of a matrix.

        Args:
            indices: (O, I): uint8 indices into the codebook; for 8 bits the int8 values themselves. What it has where
                there is no survivor does not matter.
            mask: (O, I) bool, true where there is a survivor.
            scales: (O, G) fp16, finite and not zero.
            codebook: (2^bits,) int8, or None for 8 bits.
            bits, group: see the attributes.

        Raises:
            ValueError: they do not fit together, or a survivor would be zero; all problems are named.
        """
        if found := list(_problems_of_codes(indices, mask, scales, codebook, bits, group)):
            raise ValueError("these codes cannot be packed: " + "; ".join(found))
        bitmask, row_offsets = pack_mask(mask)
        survivors = indices[mask]
        codes = (survivors.to(torch.int16) + MIDDLE).to(torch.uint8) if bits == 8 else survivors
        table = codebook if codebook is not None else torch.empty(0, dtype=torch.int8, device=mask.device)
        # Copies, so that storing a part of a larger tensor does not store all of it.
        own_scales, own_table = (t.clone(memory_format=torch.contiguous_format) for t in (scales, table))
        packed, per_word = pack_codes(codes, bits), _per_word(mask)
        weight = cls(packed, bitmask, row_offsets, own_scales, own_table, mask.shape[1], bits, group, per_word)
        if found := list(_problems_of_values(weight)):
            raise ValueError("these codes cannot be packed: " + "; ".join(found))
        return weight

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], in_features: int, bits: int, group: int, name: str = "the weight"
    ) -> FewBitWeight:
        """The weight that `tensors` was made of, every part of which is checked.

        Args:
            tensors: its `tensors()`.
            in_features, bits, group: its attributes.
            name: what it is called in errors.

        Raises:
            DamagedWeightError: names all problems.
        """
        if missing := sorted(set(TENSORS) - set(tensors)):
            raise DamagedWeightError(f"{name}: not a sound few-bit weight: {', '.join(missing)} missing")
        codes, bitmask, row_offsets, scales, codebook = (tensors[one] for one in TENSORS)
        weight = cls(codes, bitmask, row_offsets, scales, codebook, in_features, bits, group, per_word=0)
        return replace(weight, per_word=_per_word(require_sound(weight, name)))

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored, beside `in_features`, `bits` and `group`: name -> tensor."""
        return {name: getattr(self, name) for name in TENSORS}

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight (O, I): each product of codebook and scale is exact in fp32, then rounded once."""
        keep = mask_of_bits(self.bitmask, self.in_features)
        values = self.levels[unpack_codes(self.codes, self.bits, int(self.row_offsets[-1]))]
        columns = self.scales.float().repeat_interleave(self.group, dim=1)[:, : self.in_features]
        weight = torch.zeros(self.shape, dtype=dtype, device=self.device)
        weight[keep] = (values * columns[keep]).to(dtype)
        return weight

    @property
    def levels(self) -> Tensor:
        """(2^bits,) int8, the value of every code; for 8 bits it has a zero, at the code that no survivor has."""
        if self.bits == 8:
            return torch.arange(-MIDDLE, MIDDLE, device=self.device).to(torch.int8)
        return self.codebook

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return len(self.bitmask), self.in_features

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def __len__(self) -> int:
        """O."""
        return len(self.bitmask)


TENSORS = ("codes", "bitmask", "row_offsets", "scales", "codebook")
"""Names of the tensors of a `FewBitWeight`, in the order of its attributes."""


def code_bytes(count: int, bits: int) -> int:
    """Bytes of so many codes, with the padding."""
    return -(-count * bits // 8) + PADDING


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (n,) uint8, of which the lowest `bits` bits count, as the bytes of `FewBitWeight.codes`."""
    packed = torch.zeros(code_bytes(len(codes), bits), dtype=torch.uint8, device=codes.device)
    places, within = (torch.arange(n, dtype=torch.uint8, device=codes.device) for n in (bits, 8))
    for start in range(0, len(codes), _PART):
        ones = ((codes[start : start + _PART, None] >> places) & 1).flatten()
        whole = torch.nn.functional.pad(ones, (0, -len(ones) % 8)).view(-1, 8)
        first = start * bits // 8
        packed[first : first + len(whole)] = (whole << within).sum(dim=1, dtype=torch.uint8)
    return packed


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes (count,) as int64, which can index, of the bytes that `pack_codes` made."""
    codes = torch.empty(count, dtype=torch.int64, device=packed.device)
    places, within = (torch.arange(n, dtype=torch.uint8, device=packed.device) for n in (bits, 8))
    for start in range(0, count, _PART):
        part = min(_PART, count - start)
        first = start * bits // 8
        ones = (packed[first : first - (-part * bits // 8), None] >> within) & 1
        codes[start : start + part] = (ones.flatten()[: part * bits].view(part, bits) << places).sum(dim=1)
    return codes


def require_layout(weight: FewBitWeight) -> None:
    """Check dtypes and shapes, which costs a few microseconds whatever the size.

    Raises:
        DamagedWeightError: names all problems.
    """
    if found := list(_problems_of_layout(weight)):
        raise DamagedWeightError("not a sound few-bit weight: " + "; ".join(found))


def require_sound(weight: FewBitWeight, name: str) -> Tensor:
    """Check every part of a weight from an untrusted source, and return its mask, (O, I) bool.

    Raises:
        DamagedWeightError: names all problems.
    """
    found = list(_problems_of_layout(weight))
    keep = torch.empty(0)
    if not found:
        keep = mask_of_bits(weight.bitmask, weight.in_features)
        count = _code_count(weight)
        found = list(problems_of_rows(weight.bitmask, weight.row_offsets, keep, count, "codes"))
        found = found or list(_problems_of_values(weight))
    if found:
        raise DamagedWeightError(f"{name}: not a sound few-bit weight: " + "; ".join(found))
    return keep


def _code_count(weight: FewBitWeight) -> int:
    """How many codes the row offsets promise, where the bytes that are there fit that number; else how many fit."""
    promised = int(weight.row_offsets[-1])
    fits = promised >= 0 and code_bytes(promised, weight.bits) == len(weight.codes)
    return promised if fits else max(len(weight.codes) - PADDING, 0) * 8 // weight.bits


def _problems_of_layout(weight: FewBitWeight) -> Iterator[str]:
    """What is wrong with numbers, dtypes and shapes, which are known without a look into the tensors."""
    if weight.bits not in BITS or weight.group not in GROUPS:
        yield f"{weight.bits} bits in groups of {weight.group}; bits are one of {BITS}, and groups one of {GROUPS}"
        return
    if weight.in_features < 1:
        yield f"{weight.in_features} columns"
        return
    rows = len(weight.bitmask) if weight.bitmask.ndim else 0
    expected = {
        "codes": (torch.uint8, (weight.codes.numel(),)),
        "bitmask": (torch.int32, (rows, word_count(weight.in_features))),
        "row_offsets": (torch.int64, (rows + 1,)),
        "scales": (torch.float16, (rows, -(-weight.in_features // weight.group))),
        "codebook": (torch.int8, (0 if weight.bits == 8 else 2**weight.bits,)),
    }
    for name, (dtype, shape) in expected.items():
        tensor = getattr(weight, name)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            yield (
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, and {shape} {dtype}, contiguous, is expected for "
                f"{weight.bits} bits of a weight of {rows} x {weight.in_features}"
            )
        elif tensor.device != weight.codes.device:
            yield f"{name} is on {tensor.device}, and codes are on {weight.codes.device}"


def _problems_of_values(weight: FewBitWeight) -> Iterator[str]:
    """What is wrong with codes, codebook and scales, where layout and rows are sound."""
    count = int(weight.row_offsets[-1])
    if weight.bits == 8:
        if zeros := int((weight.codes[:count] == MIDDLE).sum()):
            yield f"{zeros} codes stand for zero, and no survivor may be zero"
    elif not bool(weight.codebook.all()):
        yield f"the codebook has a zero: {weight.codebook.tolist()}"
    end, used = code_bytes(count, weight.bits) - PADDING, count * weight.bits % 8
    if bool(weight.codes[end:].any()) or (used and int(weight.codes[end - 1]) >> used):
        yield "there are bits beyond the last code"
    sizes = weight.scales.float().abs()
    if wrong := int((~(sizes > 0) | sizes.isinf()).sum()):
        yield f"{wrong} scales are zero or not finite"
    elif sizes.numel() and float(sizes.max()) * int(weight.levels.int().abs().max()) > LARGEST:
        yield f"the largest scale is {float(sizes.max())}, with which weights would exceed {LARGEST}"


def _problems_of_codes(
    indices: Tensor, mask: Tensor, scales: Tensor, codebook: Tensor | None, bits: int, group: int
) -> Iterator[str]:
    """What is wrong with the arguments of `from_codes`, beside what `_problems_of_values` finds."""
    if bits not in BITS or group not in GROUPS:
        yield f"{bits} bits in groups of {group}; bits are one of {BITS}, and groups one of {GROUPS}"
        return
    if mask.ndim != 2 or not mask.numel() or mask.dtype != torch.bool:
        yield f"the mask is {tuple(mask.shape)} {mask.dtype}, and a matrix of bool is expected"
        return
    out_features, in_features = mask.shape
    expected: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]] = {
        "indices": (indices, torch.int8 if bits == 8 else torch.uint8, (out_features, in_features)),
        "scales": (scales, torch.float16, (out_features, -(-in_features // group))),
    }
    if bits == 8 and codebook is not None:
        yield "8 bits have no codebook"
    elif bits != 8 and codebook is None:
        yield f"{bits} bits need a codebook"
    elif codebook is not None:
        expected["codebook"] = (codebook, torch.int8, (2**bits,))
    unfit = [
        f"{name} is {tuple(tensor.shape)} {tensor.dtype}, and {shape} {dtype} is expected"
        for name, (tensor, dtype, shape) in expected.items()
        if tuple(tensor.shape) != shape or tensor.dtype != dtype
    ]
    yield from unfit
    if not unfit and bits != 8 and (most := int((indices * mask).max())) >= 2**bits:
        yield f"there is an index {most}, and {bits} bits reach to {2**bits - 1}"


def _per_word(keep: Tensor) -> int:
    """The attribute `per_word` of a mask (O, I)."""
    if keep.shape[1] % COLUMNS:
        return 0
    counts = keep.view(-1, COLUMNS).sum(dim=1)
    first = int(counts[0])
    return first if bool((counts == first).all()) else 0
