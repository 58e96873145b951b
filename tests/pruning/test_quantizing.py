"""Survivors in few bits: against brute force and the literal algorithm, and with what is hardest to keep non-zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spp.errors import SppError
from spp.pruning import least_squares
from spp.pruning.criteria.sparsegpt import damped_inverse
from spp.pruning.few_bits.codebook import codebook, codes, usual_levels
from spp.pruning.few_bits.descent import descended
from spp.pruning.few_bits.quantize import Quantized, round_to_nearest, with_feedback
from spp.pruning.few_bits.scales import fitted_levels, search_scales

BITS = (8, 6, 5, 4, 3, 2)


def layer(rows: int = 24, columns: int = 150, density: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A sparse weight (O, I) and the Hessian of correlated inputs, among which one column is dead."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight *= torch.rand(rows, columns, generator=generator) < density
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    inputs *= torch.rand(columns, generator=generator) * 3
    inputs[:, 5] = 0
    return weight, 2 * inputs.T @ inputs / len(inputs)


def fed_back(weight: Tensor, hessian: Tensor, bits: int, group: int = 64) -> Quantized:
    importance = least_squares.damped(hessian).diagonal()
    return with_feedback(weight, damped_inverse(hessian), importance, bits, group)


def error(weight: Tensor, quantized: Quantized, hessian: Tensor) -> float:
    """Squared error of the outputs, relative to their square."""
    off = weight - quantized.values()
    return float(((off @ hessian) * off).sum() / ((weight @ hessian) * weight).sum())


@pytest.mark.parametrize("bits", BITS)
def test_codebooks_are_symmetric_and_have_no_zero(bits: int) -> None:
    weight, _ = layer()
    for levels in (usual_levels(bits), fitted_levels(weight, torch.ones(150), bits, 64)):
        values = codebook(levels)
        assert values.dtype == torch.int8 and len(values) == 2**bits and bool((values != 0).all())
        assert values.equal(-values.flip(0)) and values.equal(values.sort().values) and values.max() == 127


@pytest.mark.parametrize("bits", BITS)
def test_a_code_is_that_of_the_nearest_value(bits: int) -> None:
    levels = usual_levels(bits)
    numbers = torch.linspace(-140, 140, 997)
    values = codebook(levels).float()
    found = (values[codes(numbers, levels).int()] - numbers).abs()
    assert found.equal((values - numbers[:, None]).abs().amin(dim=1))


@pytest.mark.parametrize("bits", BITS)
def test_scales_are_as_good_as_those_of_a_long_search(bits: int) -> None:
    weight, _ = layer(columns=64)
    importance, levels = torch.rand(64) + 0.1, usual_levels(bits)

    def error_of(scales: Tensor) -> Tensor:
        values = codebook(levels).float()[codes(weight / scales, levels).int()] * scales
        return ((values - weight).square() * importance * (weight != 0)).sum(dim=1, keepdim=True)

    found = error_of(search_scales(weight, importance, levels, 64).float())
    largest = weight.abs().amax(dim=1, keepdim=True) / 127
    best = torch.stack([error_of(largest * share) for share in torch.linspace(0.3, 1.2, 400)]).amin(dim=0)
    assert found.sum() < 1.25 * best.sum()


@pytest.mark.parametrize("bits", (5, 4, 3, 2))
def test_fitted_levels_are_better_than_evenly_spaced_ones(bits: int) -> None:
    weight, _ = layer(rows=64)
    every = torch.ones(150)

    def error_of(levels: Tensor) -> float:
        scales = search_scales(weight, every, levels, 64).float().repeat_interleave(64, dim=1)[:, :150]
        values = codebook(levels).float()[codes(weight / scales, levels).int()] * scales
        return float(((values - weight)[weight != 0]).square().sum())

    assert error_of(fitted_levels(weight, every, bits, 64)) < error_of(usual_levels(bits))


def test_eight_bits_lose_next_to_nothing_and_fewer_bits_lose_more() -> None:
    weight, hessian = layer(rows=64)
    errors = [error(weight, round_to_nearest(weight, bits, 64), hessian) for bits in BITS]
    assert errors == sorted(errors) and errors[0] < 1e-4 and errors[-1] < 0.2


def hard_matrices() -> dict[str, Tensor]:
    single = torch.zeros(4, 130)
    single[0, 0], single[1, 129], single[2, 64] = 3.0, -1e-3, 5e-9
    uneven = torch.randn(4, 130)
    uneven[:, ::2] *= 1e-7
    tiny = torch.full((4, 130), 1e-38)
    tiny[::2] = -1e-45
    return {
        "zeros": torch.zeros(4, 130),
        "single survivors": single,
        "one large and many tiny": uneven,
        "below fp16": tiny,
        "largest fp16": torch.full((4, 130), 65504.0, dtype=torch.float16),
        "denormal fp16": torch.full((4, 130), 6e-8, dtype=torch.float16),
        "bf16": torch.randn(4, 130).bfloat16(),
        "a row of zeros": torch.cat((torch.zeros(1, 130), torch.randn(3, 130))),
        "one column": torch.randn(4, 1),
        "equal": torch.full((4, 130), -0.5),
    }


@pytest.mark.parametrize("name", hard_matrices())
@pytest.mark.parametrize("bits", BITS)
def test_no_survivor_becomes_zero_and_no_zero_a_number(name: str, bits: int) -> None:
    weight = hard_matrices()[name]
    hessian = torch.eye(weight.shape[1])
    for quantized in (
        round_to_nearest(weight, bits, 64),
        fed_back(weight, hessian, bits),
        descended(weight, fed_back(weight, hessian, bits), hessian),
    ):
        values = quantized.values()
        assert bool((quantized.scales > 0).all()) and bool(torch.isfinite(quantized.scales).all())
        for stored in (values, values.to(weight.dtype)):
            assert (stored != 0).equal(weight != 0) and bool(torch.isfinite(stored).all())
            assert not bool(torch.signbit(stored[weight == 0]).any())
        assert quantized.packed().unpack().equal(values)
    assert round_to_nearest(weight, bits, 64).values().sign().equal(weight.float().sign())


@pytest.mark.parametrize(("bad", "told"), [(float("nan"), "NaN"), (float("inf"), "NaN"), (1e30, "too large")])
def test_what_few_bits_cannot_hold_is_refused(bad: float, told: str) -> None:
    weight, hessian = layer()
    weight[3, 7] = bad
    with pytest.raises(SppError, match=told):
        round_to_nearest(weight, 4, 64)
    with pytest.raises(SppError, match=told):
        fed_back(weight, hessian, 4)


def literal_feedback(weight: Tensor, hessian: Tensor, bits: int, group: int) -> Tensor:
    """GPTQ's loop in float64, with zeros that stay zeros; scales and levels as the package has them."""
    importance, inverse = least_squares.damped(hessian).diagonal(), damped_inverse(hessian)
    levels = fitted_levels(weight, importance, bits, group)
    values = codebook(levels).double()
    w, result = weight.double(), torch.zeros(weight.shape, dtype=torch.float64)
    for j in range(w.shape[1]):
        if j % group == 0:
            part = slice(j, j + group)
            survivors = torch.where(weight[:, part] != 0, w[:, part], 0)
            scales = search_scales(survivors.float(), importance[part], levels, group).double()[:, 0]
        for row in range(len(w)):
            if weight[row, j] != 0:
                candidates = values * scales[row]
                result[row, j] = candidates[(candidates - w[row, j]).abs().argmin()]
        w[:, j + 1 :] -= torch.outer(w[:, j] - result[:, j], inverse.factor[j, j + 1 :].double())
    return result


@pytest.mark.parametrize("bits", (4, 2))
@pytest.mark.parametrize("group", (64, 128))
def test_error_feedback_is_the_literal_loop(bits: int, group: int) -> None:
    weight, hessian = layer()
    found = fed_back(weight, hessian, bits, group).values()
    expected = literal_feedback(weight, hessian, bits, group).float()
    # Rounding in fp32 may send a number on the border between two values to the other one.
    assert ((found - expected).abs() < 1e-6).float().mean() > 0.99


@pytest.mark.parametrize("density", (1.0, 0.5, 0.25))
@pytest.mark.parametrize("bits", BITS)
def test_feedback_and_descent_lower_the_error_of_the_outputs(bits: int, density: float) -> None:
    weight, hessian = layer(rows=64, columns=256, density=density)
    rounded, fed = round_to_nearest(weight, bits, 64), fed_back(weight, hessian, bits)
    damped = least_squares.damped(hessian)
    finer = descended(weight, fed, damped)
    assert error(weight, fed, hessian) < error(weight, rounded, hessian)
    assert error(weight, finer, damped) < error(weight, fed, damped)
    assert (finer.values() != 0).equal(weight != 0)


def test_descent_ends_where_no_single_code_can_be_better() -> None:
    weight, hessian = layer(rows=4, columns=32)
    damped = least_squares.damped(hessian)
    quantized = fed_back(weight, hessian, 3, 64)
    for _ in range(20):
        quantized = descended(weight, quantized, damped)
    least = error(weight, quantized, damped)
    for row, column in (weight != 0).nonzero().tolist():
        kept = int(quantized.codes[row, column])
        for code in range(8):
            quantized.codes[row, column] = code
            assert error(weight, quantized, damped) >= least * (1 - 1e-5)
        quantized.codes[row, column] = kept
