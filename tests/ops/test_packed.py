"""The packed layout by hand, its round trip, its sizes, and what is said of a damaged one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from spp.errors import SppError
from spp.ops.packed import pack, packed_bytes, problems, require_sound, unpack, unpack_rows


def test_the_layout_is_the_documented_one():
    weight = torch.zeros(2, 34)
    weight[0, 0], weight[0, 31], weight[0, 33], weight[1, 2] = 1.0, 2.0, 3.0, -4.0
    weight[1, 5] = -0.0
    packed = pack(weight)
    assert packed.values.tolist() == [1.0, 2.0, 3.0, -4.0]
    assert packed.bitmask.tolist() == [[1 - 2**31, 2], [4, 0]]
    assert packed.row_offsets.tolist() == [0, 3, 4]
    assert packed.shape == (2, 34)
    assert unpack(packed).equal(weight) and not unpack(packed)[1, 5].signbit()
    assert unpack_rows(packed, 1, 2).equal(weight[1:])


@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 0.57), (0.75, 0.32)])
def test_the_size_is_the_documented_share_of_dense_bf16(sparsity, most):
    weight = torch.ones(512, 4096, dtype=torch.bfloat16)
    weight[:, : int(4096 * sparsity)] = 0
    packed = pack(weight)
    assert packed.nbytes / weight.nbytes <= most
    assert packed_bytes(len(packed.values), 512, 4096, torch.bfloat16) == packed.nbytes


def test_what_cannot_be_packed_is_named():
    with pytest.raises(ValueError, match=r"a matrix can be packed, and this tensor has the shape \(3,\)"):
        pack(torch.ones(3))
    with pytest.raises(ValueError, match=r"torch\.int8"):
        pack(torch.ones(2, 2, dtype=torch.int8))


DAMAGE = {
    "values is": lambda p: {"values": p.values.int()},
    "bitmask is": lambda p: {"bitmask": p.bitmask[:, :1]},
    "row_offsets is": lambda p: {"row_offsets": p.row_offsets.int()},
    "contiguous, is expected": lambda p: {"bitmask": p.bitmask.T.contiguous().T},
    "there are 3 values": lambda p: {"values": p.values[:-1]},
    "rows have another number of bits than of values, e.g. row 0": lambda p: {
        "bitmask": p.bitmask + torch.tensor([[2, 0], [0, 0]], dtype=torch.int32)
    },
    "run from 1 to": lambda p: {"row_offsets": p.row_offsets + 1},
    "bits beyond the last column": lambda p: {"bitmask": p.bitmask + torch.tensor([[0, 8], [0, 0]], dtype=torch.int32)},
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_named(message):
    weight = torch.zeros(2, 34)
    weight[0, 0], weight[0, 31], weight[0, 33], weight[1, 2] = 1.0, 2.0, 3.0, -4.0
    packed = pack(weight)
    assert not list(problems(packed))
    damaged = dataclasses.replace(packed, **DAMAGE[message](packed))
    with pytest.raises(SppError, match=message):
        require_sound(damaged, "the weight")


def test_all_problems_are_reported_together():
    packed = pack(torch.eye(3))
    damaged = dataclasses.replace(packed, values=packed.values.int(), row_offsets=packed.row_offsets[:2])
    with pytest.raises(SppError, match=r"the weight: .*values is.*row_offsets is"):
        require_sound(damaged, "the weight")


def test_unpacking_a_damaged_weight_fails():
    packed = pack(torch.eye(3))
    with pytest.raises(SppError, match="row 0: 2 bits, 1 values"):
        unpack(dataclasses.replace(packed, bitmask=torch.tensor([[3], [2], [4]], dtype=torch.int32)))
