"""DSnoT against a literal row by row version, and what an exchange must leave alone."""

from __future__ import annotations

import naive_pruning as naive
import pytest
import torch
from torch import Tensor

from spp import keep_masks
from spp.patterns import NM, Pattern, parse_pattern
from spp.pruning import dsnot
from spp.pruning.calibration.input_statistics import InputMoments, Moments
from spp.pruning.criteria import magnitude, wanda
from spp.pruning.criteria.result import Pruned

PATTERNS = [parse_pattern(text) for text in ("50%", "75%", "2:4", "4:8", "2:8", "1:4")]


def layer(rows: int = 24, columns: int = 64, shift: float = 0.5) -> tuple[Tensor, Tensor]:
    """A weight (O, I) and inputs (T, I) whose features have means of their own."""
    generator = torch.Generator().manual_seed(rows + columns)
    means = torch.randn(columns, generator=generator) * shift
    sizes = torch.rand(columns, generator=generator) + 0.2
    weight, noise = torch.randn(rows, columns, generator=generator), torch.randn(200, columns, generator=generator)
    return weight, noise * sizes + means


def moments(inputs: Tensor) -> InputMoments:
    statistic = Moments(inputs.shape[1])
    for batch in inputs.split(64):
        statistic.update(batch)
    return statistic.value()


def refined(weight: Tensor, inputs: Tensor, pattern: Pattern) -> tuple[Pruned, Pruned]:
    before = wanda.prune(weight, moments(inputs).norm, pattern)
    return before, dsnot.refine(weight, before, moments(inputs), pattern)


def expected_error(weight: Tensor, mask: Tensor, inputs: Tensor) -> Tensor:
    return (torch.where(mask, 0, weight) @ inputs.mean(dim=0)).abs()


def test_moments_are_those_of_all_tokens() -> None:
    _, inputs = layer()
    found = moments(inputs)
    torch.testing.assert_close(found.mean, inputs.mean(dim=0))
    torch.testing.assert_close(found.variance, inputs.var(dim=0, unbiased=False), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.norm, inputs.square().mean(dim=0).sqrt())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_the_literal_version(pattern: Pattern) -> None:
    weight, inputs = layer()
    before, after = refined(weight, inputs, pattern)
    assert after.mask.equal(naive.dsnot(weight, before.mask, inputs, pattern))
    assert not after.mask.equal(before.mask)
    assert after.weight.equal(torch.where(after.mask, weight, 0))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_counts_stay_exact_and_the_expected_error_falls(pattern: Pattern) -> None:
    weight, inputs = layer()
    before, after = refined(weight, inputs, pattern)
    assert after.mask.sum(dim=1).equal(before.mask.sum(dim=1))
    assert pattern.violations(after.weight) == 0
    if isinstance(pattern, NM):
        assert (after.mask.unflatten(1, (-1, pattern.m)).sum(dim=2) == pattern.n).all()
    lost, still = (expected_error(weight, one.mask, inputs) for one in (before, after))
    assert (still <= lost * (1 + 1e-5)).all()
    assert still.sum() < 0.9 * lost.sum()


def test_by_hand() -> None:
    """Removing 1 and 2 of either row loses E = 1 + 2 where all means are 1."""
    weight = torch.tensor([[1.0, 2.0, 4.0, -2.5], [1.0, 2.0, 3.0, -4.0]])
    one = torch.ones(4)
    pruned = magnitude.prune(weight, None, parse_pattern("50%"))
    after = dsnot.refine(weight, pruned, InputMoments(one, one, one), parse_pattern("50%"))
    # Grow 2, remove -2.5: E = 3 - 2 - 2.5 = -1.5. E < 0: grow is the most negative of the removed, and none is left.
    # Grow 2, remove -4: E = 3 - 2 - 4 = -3 would be no gain.
    assert after.mask.tolist() == [[False, True, True, False], [False, False, True, True]]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_zeros_are_never_grown(pattern: Pattern) -> None:
    weight, inputs = layer()
    weight[:, ::3] = -0.0
    _, after = refined(weight, inputs, pattern)
    assert not after.mask[:, ::3].any()
    assert not torch.signbit(after.weight[after.weight == 0]).any()


@pytest.mark.parametrize("inputs", [torch.zeros(8, 64), torch.ones(8, 64)], ids=["no input", "no variance"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_inputs_without_variance(inputs: Tensor, pattern: Pattern) -> None:
    weight, _ = layer()
    before, after = refined(weight, inputs, pattern)
    assert torch.isfinite(after.weight).all()
    assert after.mask.sum(dim=1).equal(before.mask.sum(dim=1))


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = layer()
    _, whole = refined(weight, inputs, PATTERNS[0])
    monkeypatch.setattr(keep_masks, "_PART", 5 * 64)
    assert refined(weight, inputs, PATTERNS[0])[1].mask.equal(whole.mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    weight, inputs = layer()
    _, after = refined(weight.to(dtype), inputs.to(dtype), NM(2, 4))
    assert after.weight.dtype == dtype
    assert NM(2, 4).violations(after.weight) == 0
