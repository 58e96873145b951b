"""Patterns: parsing, exact counts whatever the scores, and recognition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spp import keep_masks
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


SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-40, 1.0, 1.0, -3.0]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def adversarial_scores(rows: int, columns: int, seed: int, share: float, dtype: torch.dtype) -> Tensor:
    """Scores of which a share is special: signed zeros, infinities, NaN, denormals, many ties."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (rows, columns), generator=generator)]
    replaced = torch.rand(rows, columns, generator=generator) < share
    return torch.where(replaced, special, torch.randn(rows, columns, generator=generator)).to(dtype)


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
def test_the_matrix_loses_the_exact_count_and_no_row_more_than_one_above_another(
    pattern: Unstructured, rows: int, columns: int, seed: int, levels: int | None
) -> None:
    scores = random_scores(rows, columns, seed, levels=levels)
    mask = pattern.keep_mask(scores)
    removed = (~mask).sum(dim=1)
    assert int(removed.sum()) == pattern.removed_of(rows * columns)
    assert set(removed.tolist()) <= {pattern.removed_of(columns), pattern.removed_of(columns) + 1}
    for row, keep in zip(scores, mask, strict=True):
        if keep.any() and not keep.all():
            assert row[keep].min() >= row[~keep].max()


@pytest.mark.parametrize(("text", "removed"), [("5%", 3.2), ("90%", 57.6), ("50%", 32.0), ("33.3%", 21.312)])
def test_narrow_rows_have_the_ratio_that_was_asked_for(text: str, removed: float) -> None:
    """Rows of 64 would lose 3 of the 3.2, 57 of the 57.6; those that lose one more are evenly spread."""
    pattern = parse_pattern(text)
    gone = (~pattern.keep_mask(random_scores(100, 64, 0))).sum(dim=1).cumsum(dim=0)
    expected = torch.arange(1, 101, dtype=torch.float64) * removed
    assert ((expected - gone) < 1).all()
    assert ((expected - gone) > -1e-6).all()


@given(ratios, st.integers(1, 30), st.integers(1, 30), st.integers(0, 30), seeds)
def test_rows_of_a_matrix_can_be_masked_part_by_part(
    pattern: Unstructured, rows: int, columns: int, cut: int, seed: int
) -> None:
    scores = random_scores(rows, columns, seed)
    parts = [scores[:cut], scores[cut:]]
    masks = [pattern.keep_mask(part, first) for part, first in zip(parts, (0, len(parts[0])), strict=True) if len(part)]
    assert torch.cat(masks).equal(pattern.keep_mask(scores))


def test_the_published_count_of_a_row_is_a_ratio_of_its_own() -> None:
    scores = random_scores(10, 64, 0)
    for text, removed in (("5%", 3), ("90%", 57), ("1%", 0)):
        mask = parse_pattern(text).rounded_down(64).keep_mask(scores)  # type: ignore[union-attr]
        assert (~mask).sum(dim=1).tolist() == [removed] * 10


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


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 40), seeds, st.floats(0, 1), st.booleans(), st.booleans())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("long", [False, True], ids=["short rows", "long rows"])
def test_selection_is_a_stable_sort(
    long: bool,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    count: int,
    seed: int,
    share: float,
    finite: bool,
    strided: bool,
) -> None:
    scores = adversarial_scores(rows, columns, seed, share, dtype)
    if finite:  # NaN takes another way, and would hide this one
        scores = scores.nan_to_num(nan=-0.0)
    if strided:
        scores = scores.T.contiguous().T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keep_masks, "_PART", 30)
        if long:
            patch.setattr(keep_masks, "_SMALL_GROUP", 0)
            patch.setattr(keep_masks, "_LONG_ROW", 0)
            patch.setattr(keep_masks, "_SAMPLE", 8)
        count = min(count, columns)
        assert keep_masks.keep_all_but_lowest(scores, count).equal(keep_masks._reference(scores, count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 4, 7, 8, 16, 17])
def test_groups_of_columns_are_those_of_rows(size: int, dtype: torch.dtype) -> None:
    groups = adversarial_scores(size, 500, size, 0.5, dtype).nan_to_num()
    for removed in range(size + 1):
        expected = keep_masks._reference(groups.T, removed).T
        assert keep_masks.keep_in_groups(groups, removed).equal(expected)


@pytest.mark.parametrize("levels", [None, 2, 1000])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.999])
def test_a_long_row_has_the_exact_count(share: float, levels: int | None) -> None:
    scores = random_scores(1, 300_001, 5, levels=levels)
    mask = Unstructured(share).keep_mask(scores)
    assert mask.equal(keep_masks._reference(scores, Unstructured(share).removed_of(300_001)))


def test_an_unlucky_sample_only_costs_time() -> None:
    row = torch.zeros(300_001)
    row[:: 300_001 // keep_masks._SAMPLE] = torch.rand(len(row[:: 300_001 // keep_masks._SAMPLE])) + 1
    row[1] = -1
    for count in (1, 2, 150_000, 299_000):
        assert keep_masks.keep_all_but_lowest(row[None], count).equal(keep_masks._reference(row[None], count))


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 2), NM(5, 20), Unstructured(0.3)], ids=str)
@pytest.mark.parametrize("nan", [False, True])
def test_layout_does_not_matter(pattern: Pattern, nan: bool) -> None:
    scores = random_scores(7, 40, 2, levels=9)
    if nan:
        scores[::2, ::3] = torch.nan
    expected = pattern.keep_mask(scores)
    wide = torch.zeros(7, 80)
    wide[:, ::2] = scores
    for same in (scores.T.contiguous().T, wide[:, ::2]):
        assert pattern.keep_mask(same).equal(expected)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 20), Unstructured(0.3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_scores(pattern: Pattern, dtype: torch.dtype) -> None:
    scores = adversarial_scores(40, 9, 3, 0.3, dtype).T
    mask = pattern.keep_mask(scores)
    assert mask.equal(pattern.keep_mask(scores.contiguous()))
    groups = scores.unflatten(1, (-1, pattern.m if isinstance(pattern, NM) else 40))
    removed = pattern.m - pattern.n if isinstance(pattern, NM) else 12
    assert mask.equal(keep_masks._reference(groups, removed).flatten(1))


def test_nothing_to_choose_from() -> None:
    for shape in ((0, 4), (4, 0), (0, 0)):
        assert keep_masks.keep_all_but_lowest(torch.zeros(shape), 0).shape == shape
    assert NM(2, 4).keep_mask(torch.zeros(0, 8)).shape == (0, 8)


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
    dense = pattern.violations(1 + scores)
    assert dense == rows * (groups if isinstance(pattern, NM) else int(columns * pattern.sparsity + 1e-9))


def test_violations_count_by_hand() -> None:
    weight = torch.tensor([[1.0, 0, 2, 0], [1, 2, 3, 0]])
    assert NM(2, 4).violations(weight) == 1
    assert NM(1, 4).violations(weight) == 2
    assert NM(2, 3).violations(weight) > 0  # 3 does not divide 4
    assert Unstructured(0.5).violations(weight) == 1
    assert Unstructured(0.25).violations(weight) == 0
    assert NM(2, 4).violations(torch.tensor([[1.0, -0.0, 2, -0.0]])) == 0


@pytest.mark.parametrize("pattern", [NM(1, 4), NM(2, 8), NM(2, 4), NM(4, 8)])
def test_recognizes_known_patterns(pattern: NM) -> None:
    scores = random_scores(64, 64, 1)
    assert detect_pattern(torch.where(pattern.keep_mask(scores), 1 + scores, 0.0)) == pattern


def test_recognizes_a_ratio_and_a_dense_weight() -> None:
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
