"""The proof counts exactly what it says, on cases counted by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from spp.ops import native
from spp.ops.zero_proof import TensorProof, compare, compare_in_torch

NAN, INF = float("nan"), float("inf")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LEVELS = [level for level in range(4) if native.instructions(level)]
ADVERSARIAL = [0.0, -0.0, 1.0, -1.0, NAN, INF, -INF, 1e-45, -1e-45, 6e-8, 1e-40, 65504.0, 3e38, -3e38, 1.5, 2.0]


def test_counts_are_those_counted_by_hand():
    base = torch.tensor([[0.0, -0.0, 1.0, -2.0], [0.0, 0.0, 4.0, 8.0]])
    other = torch.tensor([[0.0, 0.0, 1.5, 2.0], [-0.0, 1e-8, 0.0, 8.0]])
    proof = compare(base, other)
    assert dataclasses.asdict(proof) == {
        "zeros": 4,
        "offenders": 2,
        "negative_zeros": 1,
        "survivors": 4,
        "underflowed": 1,
        "unchanged": 1,
        "sign_flips": 1,
        "non_finite": 0,
        "largest_relative_change": 2.0,
    }
    assert not proof.holds


def test_identical_tensors_hold():
    weight = torch.tensor([[0.0, 1.0], [NAN, INF]])
    proof = compare(weight, weight.clone())
    assert proof.holds
    assert (proof.zeros, proof.survivors) == (1, 3)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_new_nan_or_infinity_breaks_the_proof(poison):
    proof = compare(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([poison, 0.0, 2.0]))
    assert (proof.non_finite, proof.offenders) == (1, 0)
    assert not proof.holds
    assert not compare(torch.tensor([0.0]), torch.tensor([poison])).holds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_smallest_denormal_is_no_zero(dtype):
    tiniest = torch.zeros(1, dtype=dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tiniest.element_size()]
    tiniest.view(bits).fill_(1)
    assert compare(torch.zeros(1, dtype=dtype), tiniest).offenders == 1
    assert compare(tiniest, torch.zeros(1, dtype=dtype)).underflowed == 1


def test_dtypes_may_differ():
    base = torch.tensor([0.0, 1.0], dtype=torch.bfloat16)
    assert compare(base, base.double()).unchanged == 1


def test_empty_tensors_hold():
    assert compare(torch.empty(0, 4), torch.empty(0, 4)).holds


@pytest.mark.skipif(not LEVELS, reason="the native library was not built")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("after", FLOATS)
@pytest.mark.parametrize("before", FLOATS)
def test_native_counts_are_those_of_torch(before, after, level):
    every_pair = torch.cartesian_prod(torch.tensor(ADVERSARIAL), torch.tensor(ADVERSARIAL))
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 15, 16, 17, 255, 70_001):  # the last one is more than a block
        chosen = torch.randint(len(every_pair), (size,), generator=generator)
        base, other = every_pair[chosen].T.contiguous()
        _equal(level, base.to(before), other.to(after))
    base, other = every_pair.T.contiguous()
    _equal(level, base.to(before), other.to(after))


@pytest.mark.skipif(not LEVELS, reason="the native library was not built")
@pytest.mark.parametrize("level", LEVELS)
def test_native_counts_of_ordinary_weights_are_those_of_torch(level):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(333, 517, generator=generator, dtype=torch.float32)
    base[torch.rand(base.shape, generator=generator) < 0.5] = 0
    other = (base * (1 + 0.01 * torch.randn(base.shape, generator=generator))).bfloat16()
    found = _equal(level, base, other)
    assert found.holds and 0 < found.largest_relative_change < 0.1


def _equal(level, base, other):
    found, expected = TensorProof(**native.compare(base, other, level=level)), compare_in_torch(base, other)
    assert found == expected
    return found


def test_a_transposed_weight_is_compared_where_it_lies():
    base = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 4.0]])
    other = base.clone()
    other[0, 1], other[1, 1] = 1.5, 7.0
    assert compare(base.T, other.T) == compare(base, other) == compare(base.T, other.T.contiguous())
    assert compare(base, other).offenders == 1
