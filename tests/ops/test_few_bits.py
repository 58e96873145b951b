"""The layout of few-bit survivors: by hand, in and out, its size, and what is said of input that is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from few_bit_cases import PATTERNS, draw_few_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from spp.errors import SppError
from spp.ops.few_bits import BITS, GROUPS, PADDING, FewBitWeight, pack_codes, unpack_codes
from spp.ops.packed import pack

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CODEBOOK = torch.tensor([-3, -1, 1, 3], dtype=torch.int8)


def by_hand():
    """Two rows of 66 columns in 2 bits, with two groups each."""
    mask = torch.zeros(2, 66, dtype=torch.bool)
    indices = torch.zeros(2, 66, dtype=torch.uint8)
    for row, column, index in ((0, 0, 3), (0, 63, 1), (0, 65, 2), (1, 1, 2)):
        mask[row, column], indices[row, column] = True, index
    scales = torch.tensor([[0.5, 2.0], [1.0, 4.0]], dtype=torch.float16)
    return FewBitWeight.from_codes(indices, mask, scales, CODEBOOK, 2, 64)


def test_the_layout_is_the_documented_one():
    weight = by_hand()
    assert weight.codes.tolist() == [0b10_10_01_11] + [0] * PADDING  # 3, 1, 2 of the first row, then 2 of the second
    assert weight.bitmask.tolist() == [[1, -(2**31), 2], [2, 0, 0]]
    assert weight.row_offsets.tolist() == [0, 3, 4]
    dense = torch.zeros(2, 66)
    dense[0, 0], dense[0, 63], dense[0, 65], dense[1, 1] = 1.5, -0.5, 2.0, 1.0
    assert weight.unpack().equal(dense) and weight.per_word == 0


def test_codes_of_8_bits_are_values_above_128():
    values = torch.tensor([[-128, 127, -1, 5]], dtype=torch.int8)
    mask = torch.tensor([[True, True, False, True]])
    weight = FewBitWeight.from_codes(values, mask, torch.tensor([[0.25]]).half(), None, 8, 128)
    assert weight.codes[:3].tolist() == [0, 255, 133]
    assert weight.unpack(torch.float64).tolist() == [[-32.0, 31.75, 0.0, 1.25]]


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 200)),
    st.sampled_from(BITS),
    st.sampled_from(GROUPS),
    st.sampled_from(PATTERNS),
    st.integers(0, 10**6),
)
def test_every_value_comes_back_from_what_is_stored(shape, bits, group, pattern, seed):
    weight, dense = draw_few_bits(shape, bits, group, pattern, seed)
    stored = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    again = FewBitWeight.from_tensors(stored, shape[1], bits, group)
    assert again.unpack(torch.float64).equal(dense) and again.per_word == weight.per_word
    assert again.bitmask.equal(pack(dense).bitmask)
    for dtype in DTYPES:
        unpacked = again.unpack(dtype)
        assert unpacked.equal(dense.to(dtype))
        assert not unpacked[dense == 0].signbit().any()
        assert (unpacked != 0).equal(dense != 0)


@pytest.mark.parametrize("bits", BITS)
def test_more_codes_than_are_packed_at_once(bits):
    codes = torch.randint(2**bits, (2**20 + 77,), generator=torch.Generator().manual_seed(bits)).byte()
    assert unpack_codes(pack_codes(codes, bits), bits, len(codes)).equal(codes.long())


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_survivor_becomes_zero_with_any_scale(dtype):
    """All fp16 numbers as scales of the smallest level there is; those that are refused are zero, or not finite."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    scales = every[every.isfinite() & (every != 0) & (every.abs() * 128 <= 65504)][:, None]
    ones = torch.ones(len(scales), 1, dtype=torch.int8)
    weight = FewBitWeight.from_codes(ones, ones.bool(), scales, None, 8, 64)
    unpacked = weight.unpack(dtype)
    assert (unpacked != 0).all() and unpacked.isfinite().all()


@pytest.mark.parametrize(("pattern", "per_word"), [("2:4", 32), ("4 of 64", 4), ("half", 0), ("all", 64)])
def test_fixed_counts_are_noticed(pattern, per_word):
    assert draw_few_bits((3, 128), 4, 128, pattern)[0].per_word == per_word


@pytest.mark.parametrize(("bits", "pattern", "most"), [(8, "2:4", 5.16), (4, "2:4", 3.16), (4, "4 of 64", 1.41)])
def test_the_size_is_the_documented_one(bits, pattern, most):
    weight, _ = draw_few_bits((64, 4096), bits, 128, pattern)
    assert weight.nbytes * 8 / (64 * 4096) <= most


REFUSED = {
    "bits are one of": {"bits": 7},
    "groups one of": {"group": 32},
    "bool is expected": {"mask": torch.ones(2, 66)},
    "indices is": {"indices": torch.zeros(2, 66, dtype=torch.int8)},
    "scales is": {"scales": torch.ones(2, 2)},
    "codebook is": {"codebook": CODEBOOK[:3]},
    "2 bits need a codebook": {"codebook": None},
    "there is an index 4": {"indices": torch.full((2, 66), 4, dtype=torch.uint8)},
    "codebook has a zero": {"codebook": torch.tensor([-1, 0, 1, 2], dtype=torch.int8)},
    "1 scales are zero": {"scales": torch.tensor([[1, 1], [1, 0]]).half()},
    "scales are zero or not finite": {"scales": torch.tensor([[1, 1], [1, torch.nan]]).half()},
    "would exceed 65504": {"scales": torch.tensor([[1, 1], [1, 30000]]).half()},
    "indices is .*; scales is": {"indices": torch.zeros(1), "scales": torch.ones(1)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_packed_is_named(message):
    arguments = {
        "indices": torch.zeros(2, 66, dtype=torch.uint8),
        "mask": torch.ones(2, 66, dtype=torch.bool),
        "scales": torch.ones(2, 2).half(),
        "codebook": CODEBOOK,
        "bits": 2,
        "group": 64,
    }
    FewBitWeight.from_codes(**arguments)
    with pytest.raises(ValueError, match=message):
        FewBitWeight.from_codes(**arguments | REFUSED[message])


def test_a_code_of_8_bits_for_zero_is_refused():
    values = torch.tensor([[1, 0]], dtype=torch.int8)
    scales = torch.ones(1, 1).half()
    with pytest.raises(ValueError, match="1 codes stand for zero"):
        FewBitWeight.from_codes(values, torch.tensor([[True, True]]), scales, None, 8, 64)
    FewBitWeight.from_codes(values, torch.tensor([[True, False]]), scales, None, 8, 64)
    with pytest.raises(ValueError, match="8 bits have no codebook"):
        FewBitWeight.from_codes(values, values.bool(), scales, CODEBOOK, 8, 64)


DAMAGE = {
    "codes missing": lambda w: {"codes": None},
    "codes is": lambda w: {"codes": w.codes.short()},
    "bitmask is": lambda w: {"bitmask": w.bitmask[:, :2]},
    "row_offsets is": lambda w: {"row_offsets": w.row_offsets.int()},
    "scales is": lambda w: {"scales": w.scales[:, :1]},
    "codebook is": lambda w: {"codebook": w.codebook[:2]},
    "contiguous, is expected": lambda w: {"bitmask": w.bitmask.T.contiguous().T},
    "rows have another number of bits than of codes": lambda w: {"bitmask": w.bitmask | 4},
    "and there are 0 codes": lambda w: {"codes": w.codes[1:]},
    "and there are 8 codes": lambda w: {"codes": torch.cat([w.codes, w.codes[:1]])},
    "run from 1 to": lambda w: {"row_offsets": w.row_offsets + 1},
    "run from -4 to": lambda w: {"row_offsets": w.row_offsets - 4},
    "bits beyond the last column": lambda w: {"bitmask": w.bitmask + torch.tensor([[0, 0, 8], [0, 0, 0]]).int()},
    "bits beyond the last code": lambda w: {"codes": w.codes + (torch.arange(len(w.codes)) == 5).byte()},
    "codebook has a zero": lambda w: {"codebook": w.codebook - 1},
    "scales are zero or not finite": lambda w: {"scales": w.scales * torch.inf},
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_named(message):
    weight = by_hand()
    tensors = {name: t for name, t in (weight.tensors() | DAMAGE[message](weight)).items() if t is not None}
    with pytest.raises(SppError, match=f"^layer 3: not a sound few-bit weight: .*{message}"):
        FewBitWeight.from_tensors(tensors, 66, 2, 64, "layer 3")


def test_bits_in_the_last_byte_behind_the_last_code_are_refused():
    weight, _ = draw_few_bits((1, 3), 2, 64, "all")
    assert weight.codes[0] < 64
    with pytest.raises(SppError, match="bits beyond the last code"):
        FewBitWeight.from_tensors(weight.tensors() | {"codes": weight.codes | 64}, 3, 2, 64)


@pytest.mark.parametrize(("field", "value"), [("bits", 3), ("bits", 7), ("group", 32), ("in_features", 97)])
def test_numbers_that_do_not_fit_the_tensors_are_refused(field, value):
    numbers = {"in_features": 66, "bits": 2, "group": 64} | {field: value}
    with pytest.raises(SppError, match="not a sound few-bit weight"):
        FewBitWeight.from_tensors(by_hand().tensors(), **numbers)


def test_what_is_kept_shares_no_memory_with_what_was_given():
    mask, scales = torch.ones(2, 66, dtype=torch.bool), torch.ones(4, 2).half()[::2]
    codebook = CODEBOOK.clone()
    weight = FewBitWeight.from_codes(torch.zeros(2, 66).byte(), mask, scales, codebook, 2, 64)
    before = weight.unpack()
    codebook.fill_(1), scales.fill_(7)
    assert weight.unpack().equal(before)
    assert dataclasses.replace(weight).nbytes == sum(t.nbytes for t in weight.tensors().values())
