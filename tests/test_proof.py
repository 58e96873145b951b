"""The proof counts exactly what it says, on cases counted by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from spp.proof import compare

NAN, INF = float("nan"), float("inf")


def test_a_hand_counted_case():
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
