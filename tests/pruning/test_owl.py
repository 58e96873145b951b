"""OWL: outliers counted as published, and ratios whose mean is exact."""

from __future__ import annotations

import math

import naive_pruning as naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spp import keep_masks
from spp.pruning.owl import outlier_share, owl_ratios


def test_outliers_by_hand() -> None:
    weight = torch.tensor([[1.0, -1.0], [1.0, 9.0]])
    assert outlier_share([(weight, torch.tensor([1.0, 1.0]))], 2.0) == 0.25  # the mean is 3
    assert outlier_share([(weight, torch.tensor([1.0, 0.0]))], 1.5) == 0.5  # scores 1 0 1 0
    assert outlier_share([], 5.0) == 0


def test_outliers_are_counted_over_the_whole_block() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(50, 32, generator=generator) * torch.rand(32, generator=generator) for _ in range(2)]
    weights = [torch.randn(16, 32, generator=generator) ** 3, torch.randn(24, 32, generator=generator)]
    norms = [x.square().mean(dim=0).sqrt() for x in inputs]
    share = outlier_share(list(zip(weights, norms, strict=True)), 3.0)
    assert share == pytest.approx(naive.outlier_share(weights, inputs, 3.0), abs=1e-9)
    assert 0 < share < 0.5


def test_ratios_by_hand() -> None:
    assert owl_ratios([0.1, 0.2, 0.3], [1, 1, 1], 0.7, 0.08) == pytest.approx([0.78, 0.7, 0.62])
    assert owl_ratios([0.5, 0.5], [1, 3], 0.5, 0.08) == [0.5, 0.5]


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**9)), min_size=1, max_size=50),
    st.floats(0.01, 0.99),
    st.floats(0.001, 0.4),
)
def test_the_mean_is_exact_and_the_limit_holds(blocks: list[tuple[float, int]], target: float, limit: float) -> None:
    shares, sizes = [share for share, _ in blocks], [size for _, size in blocks]
    ratios = owl_ratios(shares, sizes, target, limit)
    mean = math.fsum(ratio * size for ratio, size in zip(ratios, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(target, abs=1e-9)
    assert all(abs(ratio - target) <= limit + 1e-12 and 0 < ratio < 1 for ratio in ratios)
    for one, other in zip(zip(shares, ratios, strict=True), list(zip(shares, ratios, strict=True))[1:], strict=False):
        assert one[0] == other[0] or (one[0] > other[0]) == (one[1] < other[1]) or one[1] == pytest.approx(other[1])


def test_shares_that_hardly_differ() -> None:
    shares = [0.1, math.nextafter(0.1, 1), 0.1]
    ratios = owl_ratios(shares, [3, 1, 10**9], 0.5, 0.08)
    assert all(abs(ratio - 0.5) <= 0.08 + 1e-12 for ratio in ratios)
    assert ratios[0] == pytest.approx(0.5, abs=1e-9) and ratios[1] == pytest.approx(0.42)


def test_no_block_is_pruned_away() -> None:
    ratios = owl_ratios([0.0, 0.5], [1, 1], 0.99, 0.3)
    assert all(0 < ratio < 1 for ratio in ratios) and sum(ratios) == pytest.approx(1.98)


def test_outliers_do_not_depend_on_how_rows_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scored = [(torch.randn(37, 16, generator=generator) ** 3, torch.rand(16, generator=generator)) for _ in range(3)]
    whole = outlier_share(scored, 3.0)
    monkeypatch.setattr(keep_masks, "_PART", 100)
    assert outlier_share(scored, 3.0) == whole > 0
