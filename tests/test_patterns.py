"""Patterns: parsing, exact counts whatever the scores, and recognition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spp.errors import UsageError
from spp.patterns import NM, Pattern, Unstructured, detect_pattern, parse_pattern

seeds = st.integers(0, 2**31 - 1)
nm_patterns = st.integers(2, 12).flatmap(lambda m: st.builds(NM, st.integers(1, m - 1), st.just(m)))
# Four decimals of a per cent: what a person writes.
ratios = st.integers(1, 999_999).map(lambda n: Unstructured(n / 1_000_000))


def random_scores(rows: int, columns: int, seed: int, *, levels: int | None = None) -> Tensor:
    """Scores with or without ties (`levels` distinct values)."""
    generator = torch.Generator().manual_seed(seed)
    if levels is not None:
        return torch.randint(levels, (rows, columns), generator=generator).float()
    return torch.rand(rows, columns, generator=generator)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        (" 4 : 8 ", NM(4, 8)),
        ("1:4", NM(1, 4)),
        ("50%", Unstructured(0.5)),
        ("50 %", Unstructured(0.5)),
        ("0.5", Unstructured(0.5)),
        (".75", Unstructured(0.75)),
        ("33.3%", Unstructured(0.333)),
    ],
)
def test_parses_what_people_write(text: str, pattern: Pattern) -> None:
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "text", ["", "2", "50", "0", "0%", "100%", "1.0", "4:2", "4:4", "0:4", "2:4:8", "half", "-50%", "2:", "nan", "5e-1"]
)
def test_refuses_what_is_no_pattern_and_shows_it(text: str) -> None:
    with pytest.raises(UsageError, match="pattern") as caught:
        parse_pattern(text)
    assert repr(text) in str(caught.value)


def test_suggests_the_forgotten_per_cent_sign() -> None:
    with pytest.raises(UsageError, match=r"did you mean 50%\?"):
        parse_pattern("50")


@pytest.mark.parametrize("text", ["50%", "75%", "33.3%", "7%", "2:4", "0.00001%", "99.9999%"])
def test_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_pattern(text)) == text


@given(ratios | nm_patterns)
def test_text_round_trip(pattern: Pattern) -> None:
    again = parse_pattern(str(pattern))
    assert again.sparsity == pytest.approx(pattern.sparsity, rel=1e-12)
    assert str(again) == str(pattern)


@given(st.integers(1, 99), st.integers(1, 10_000))
def test_counts_are_those_of_exact_arithmetic(percent: int, count: int) -> None:
    assert parse_pattern(f"{percent}%").removed_of(count) == count * percent // 100  # type: ignore[union-attr]


def test_counts_stay_exact_for_a_whole_matrix() -> None:
    assert Unstructured(0.07).removed_of(11008 * 4096 * 100) == 11008 * 4096 * 7


@given(ratios, st.integers(1, 6), st.integers(1, 60), seeds, st.none() | st.integers(1, 3))
def test_every_row_loses_the_exact_count(
    pattern: Unstructured, rows: int, columns: int, seed: int, levels: int | None
) -> None:
    scores = random_scores(rows, columns, seed, levels=levels)
    mask = pattern.keep_mask(scores)
    assert (~mask).sum(dim=1).tolist() == [pattern.removed_of(columns)] * rows
    for row, keep in zip(scores, mask, strict=True):
        if keep.any() and not keep.all():
            assert row[keep].min() >= row[~keep].max()


@given(nm_patterns, st.integers(1, 5), st.integers(1, 6), seeds, st.none() | st.integers(1, 3))
def test_every_group_keeps_exactly_n(pattern: NM, rows: int, groups: int, seed: int, levels: int | None) -> None:
    scores = random_scores(rows, groups * pattern.m, seed, levels=levels)
    mask = pattern.keep_mask(scores)
    kept = mask.unflatten(-1, (-1, pattern.m))
    assert (kept.sum(dim=-1) == pattern.n).all()
    grouped = scores.unflatten(-1, (-1, pattern.m))
    lowest_kept = grouped.masked_fill(~kept, torch.inf).amin(dim=-1)
    highest_removed = grouped.masked_fill(kept, -torch.inf).amax(dim=-1)
    assert (lowest_kept >= highest_removed).all()


def test_ties_go_by_position() -> None:
    assert NM(2, 4).keep_mask(torch.ones(1, 8)).tolist() == [[False, False, True, True] * 2]
    assert Unstructured(0.5).keep_mask(torch.ones(1, 5)).tolist() == [[False, False, True, True, True]]


def test_nan_counts_as_the_highest_score() -> None:
    scores = torch.tensor([[torch.nan, 3.0, torch.inf, 1.0]])
    assert NM(2, 4).keep_mask(scores).tolist() == [[True, False, True, False]]


def test_n_of_m_needs_a_divisible_dimension() -> None:
    with pytest.raises(UsageError, match="divisible by 4.*has 6.*--skip-indivisible"):
        NM(2, 4).keep_mask(torch.ones(2, 6))
    assert not NM(2, 4).fits(6)
    assert Unstructured(0.5).fits(7)


@given(nm_patterns | ratios, st.integers(1, 5), st.integers(1, 5), seeds)
def test_a_pruned_weight_breaks_nothing_and_a_dense_one_does(
    pattern: Pattern, rows: int, groups: int, seed: int
) -> None:
    columns = groups * (pattern.m if isinstance(pattern, NM) else 7)
    scores = random_scores(rows, columns, seed)
    mask = pattern.keep_mask(scores)
    assert pattern.violations(torch.where(mask, 1 + scores, 0.0)) == 0
    removed = int((~mask).sum())
    dense = pattern.violations(1 + scores)
    assert dense == (rows * groups if isinstance(pattern, NM) else removed)


def test_violations_count_by_hand() -> None:
    weight = torch.tensor([[1.0, 0, 2, 0], [1, 2, 3, 0]])
    assert NM(2, 4).violations(weight) == 1
    assert NM(1, 4).violations(weight) == 2
    assert NM(2, 3).violations(weight) > 0  # 3 does not divide 4
    assert Unstructured(0.5).violations(weight) == 1
    assert Unstructured(0.25).violations(weight) == 0
    assert NM(2, 4).violations(torch.tensor([[1.0, -0.0, 2, -0.0]])) == 0


@pytest.mark.parametrize("pattern", [NM(1, 4), NM(2, 8), NM(2, 4), NM(4, 8)])
def test_recognises_known_patterns(pattern: NM) -> None:
    scores = random_scores(64, 64, 1)
    assert detect_pattern(torch.where(pattern.keep_mask(scores), 1 + scores, 0.0)) == pattern


def test_recognises_a_ratio_and_a_dense_weight() -> None:
    scores = random_scores(64, 64, 1)
    assert detect_pattern(torch.where(Unstructured(0.5).keep_mask(scores), 1 + scores, 0.0)) == Unstructured(0.5)
    assert detect_pattern(1 + scores) is None
    almost_dense = 1 + scores
    almost_dense[0, :10] = 0
    assert detect_pattern(almost_dense) is None


def test_recognition_of_odd_shapes() -> None:
    assert detect_pattern(torch.zeros(3, 5)) == Unstructured(1.0)
    assert detect_pattern(torch.zeros(3, 8)) == NM(1, 4)
    assert detect_pattern(torch.zeros(0, 4)) is None
