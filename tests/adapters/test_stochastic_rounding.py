"""Rounding at random: one of the two neighbours, right in the mean, and exact numbers stay."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spp.adapters.stochastic_rounding import round_stochastically

PAIRS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.bfloat16),
    (torch.float64, torch.float16),
    (torch.float64, torch.float32),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """The largest number of a dtype that is at most x, and the smallest that is at least x; by search over all bits."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    every = every[every.isfinite()]
    return float(every[every <= x].max()), float(every[every >= x].min())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "x", [1 + 2**-9 + 2**-13, -(1 + 2**-9 + 2**-13), 1 - 2**-12, 0.1, -3.3, 5e-7, -2e-8, 2**-14 - 2**-26, 1000.3]
)
def test_the_result_is_a_neighbour_and_the_mean_is_right(x: float, dtype: torch.dtype) -> None:
    wide = torch.full((40_000,), x, dtype=torch.float32)
    exact = float(wide[0])
    lower, upper = neighbours(exact, dtype)
    rounded = round_stochastically(wide, dtype, generator()).double()
    assert rounded.unique().tolist() == [lower, upper]
    # Six standard deviations of the mean of so many draws.
    share = (exact - lower) / (upper - lower)
    tolerance = 6 * math.sqrt(share * (1 - share) / len(wide)) * (upper - lower)
    assert float(rounded.mean()) == pytest.approx(exact, abs=tolerance)


@pytest.mark.parametrize(("wide", "dtype"), PAIRS)
def test_what_the_dtype_holds_exactly_stays(wide: torch.dtype, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    exact = [0.0, -0.0, 1.0, -1.5, info.max, info.min, info.tiny, info.smallest_normal / 2, math.inf, -math.inf]
    tensor = torch.tensor(exact, dtype=wide).repeat(100)
    rounded = round_stochastically(tensor, dtype, generator())
    assert rounded.equal(tensor.to(dtype))
    assert rounded.signbit().equal(tensor.signbit())


@pytest.mark.parametrize(("wide", "dtype"), PAIRS)
def test_nothing_new_becomes_infinite_or_nan(wide: torch.dtype, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    tensor = torch.tensor([largest * (1 + 2**-13), -largest * (1 + 2**-13), math.nan], dtype=wide).repeat(1000)
    near = tensor.to(dtype)
    rounded = round_stochastically(tensor, dtype, generator())
    assert rounded.isnan().equal(near.isnan())
    assert rounded.isinf().equal(near.isinf())


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50), st.integers(0, 2**32 - 1))
def test_every_result_is_next_to_its_number(numbers: list[float], seed: int) -> None:
    tensor = torch.tensor(numbers, dtype=torch.float32)
    rounded: Tensor = round_stochastically(tensor, torch.bfloat16, generator(seed))
    truncated = (tensor.view(torch.int32) & -(2**16)).view(torch.float32)  # bf16 is the upper half of fp32
    away = (truncated.view(torch.int32) + (tensor != truncated).int() * 2**16).view(torch.float32)
    nearest = tensor.bfloat16().float()
    result = rounded.float()
    assert bool(((result == truncated) | (result == away)).all())
    assert bool((result == nearest)[nearest.isinf()].all())


def test_a_seed_fixes_every_bit_over_several_pieces() -> None:
    tensor = torch.randn(3, 2**19, generator=generator())
    one, same = (round_stochastically(tensor, torch.bfloat16, generator(7)) for _ in range(2))
    other = round_stochastically(tensor, torch.bfloat16, generator(8))
    assert one.equal(same)
    assert one.shape == tensor.shape
    assert not one.equal(other)


def test_updates_below_the_nearest_numbers_reach_survive_in_the_mean() -> None:
    """W (1 + 2^-11) is W in bf16; of the update, a share of about 2^-11 / 2^-8 to 2^-11 / 2^-7 of all weights jump."""
    weight = torch.randn(200_000, generator=generator()).bfloat16().float()
    wanted = weight * (1 + 2**-11)
    assert wanted.bfloat16().float().equal(weight)
    rounded = round_stochastically(wanted, torch.bfloat16, generator(1)).float()
    gained = float((rounded.abs() - weight.abs()).sum() / weight.abs().sum())
    assert gained == pytest.approx(2**-11, rel=0.05)
