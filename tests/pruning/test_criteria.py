"""Criteria against literal implementations of the published formulas, and against sums done by hand."""

from __future__ import annotations

import math
from pathlib import Path

import naive_pruning as naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spp import keep_masks
from spp.errors import SppError, UsageError
from spp.patterns import NM, Pattern, parse_pattern
from spp.pruning.calibration.input_statistics import Gram, InputNorm, Moments, Statistic
from spp.pruning.criteria import magnitude, reference, ria, sparsegpt, wanda
from spp.pruning.criteria.result import Pruned
from spp.pruning.steps import CRITERIA

PATTERNS = [parse_pattern(text) for text in ("50%", "75%", "2:4", "4:8", "2:8", "1:4")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A weight (O, I) and correlated inputs (T, I) with features of different size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.rand(columns, generator=generator) * 3
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing * sizes
    return weight.to(dtype), inputs.to(dtype)


def run(criterion: str, weight: Tensor, inputs: Tensor, pattern: Pattern) -> Pruned:
    """Prune as the engine does, with the inputs arriving in uneven batches."""
    method = CRITERIA[criterion]  # type: ignore[index]
    value = None
    if method.statistic is not None:
        statistic = method.statistic(inputs.shape[1])
        for batch in inputs.split([1, len(inputs) // 3, len(inputs) - len(inputs) // 3 - 1]):
            statistic.update(batch[None])
        value = statistic.value(method.derive)
    return method.prune(weight, value, pattern)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_magnitude_equals_the_formula(pattern: Pattern, dtype: torch.dtype) -> None:
    weight, inputs = layer(24, 40, dtype=dtype)
    pruned = run("magnitude", weight, inputs, pattern)
    assert pruned.mask.equal(naive.magnitude(weight, pattern))
    assert pruned.weight.equal(torch.where(pruned.mask, weight, 0))
    assert pruned.weight.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("criterion", ["wanda", "ria"])
def test_wanda_and_ria_equal_their_formulas(criterion: str, pattern: Pattern, dtype: torch.dtype) -> None:
    weight, inputs = layer(24, 40, dtype=dtype)
    pruned = run(criterion, weight, inputs, pattern)
    assert pruned.mask.equal(getattr(naive, criterion)(weight, inputs, pattern))
    assert pruned.weight.equal(torch.where(pruned.mask, weight, 0))
    simpler = naive.magnitude(weight, pattern) if criterion == "wanda" else naive.wanda(weight, inputs, pattern)
    assert not pruned.mask.equal(simpler)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_magnitude_over_the_matrix_equals_the_formula(pattern: Pattern) -> None:
    weight, inputs = layer(24, 40)
    pruned = run("magnitude-matrix", weight, inputs, pattern)
    assert pruned.mask.equal(naive.magnitude_over_the_matrix(weight, pattern))


@pytest.mark.parametrize("columns", [40, 256, 296])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_equals_the_formula(pattern: Pattern, columns: int) -> None:
    weight, inputs = layer(32, columns)
    pruned = run("sparsegpt", weight, inputs, pattern)
    expected, mask = naive.sparsegpt(weight, inputs, pattern)
    assert pruned.mask.eq(mask).double().mean() >= 0.999
    rows = pruned.mask.eq(mask).all(dim=1)  # a tie decided otherwise changes the rest of its row
    assert rows.double().mean() >= 0.9
    torch.testing.assert_close(pruned.weight[rows].double(), expected[rows], rtol=1e-4, atol=1e-4)
    assert pruned.note is None


@pytest.mark.parametrize("columns", [40, 256])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_admm_equals_the_formula(pattern: Pattern, columns: int) -> None:
    weight, inputs = layer(32, columns)
    weight[:, ::7], inputs[:, 3] = 0, 0  # zeros that stay, and an input that is dead
    pruned = run("admm", weight, inputs, pattern)
    expected, mask = naive.admm(weight, inputs, pattern)
    assert pruned.mask.eq(mask).double().mean() >= 0.999
    rows = pruned.mask.eq(mask).all(dim=1)
    assert rows.double().mean() >= 0.9
    torch.testing.assert_close(pruned.weight[rows].double(), expected[rows], rtol=1e-3, atol=1e-3)
    assert not pruned.weight[:, 3].any() and not pruned.weight[:, ::7].any()
    assert pattern.excess(pruned.mask) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 128), (7, 264)])
@pytest.mark.parametrize("pattern", [parse_pattern("30%"), NM(2, 4), NM(1, 8)], ids=str)
def test_sparsegpt_equals_its_readable_version(pattern: Pattern, rows: int, columns: int, dtype: torch.dtype) -> None:
    weight, inputs = layer(rows, columns, dtype=dtype)
    weight[rows // 2] = 0.0  # a row of zeros, and zeros of either sign elsewhere
    weight[:, ::5] *= -0.0
    inverse = sparsegpt.damped_inverse(2 / len(inputs) * inputs.float().T @ inputs.float())
    fast, readable = sparsegpt.prune(weight, inverse, pattern), reference.sparsegpt(weight, inverse, pattern)
    assert fast.mask.equal(readable.mask)
    torch.testing.assert_close(fast.weight, readable.weight, rtol=1e-4, atol=1e-4)
    assert not fast.weight[weight == 0].any() and not readable.weight[weight == 0].any()


def test_sparsegpt_blocks_hold_whole_groups() -> None:
    weight, inputs = layer(8, 270)
    pattern = NM(2, 5)  # 128 is no multiple of 5: blocks of 125
    pruned = run("sparsegpt", weight, inputs, pattern)
    expected, mask = naive.sparsegpt(weight, inputs, pattern)
    assert pruned.mask.equal(mask)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=1e-4, atol=1e-4)
    long_groups = run("sparsegpt", *layer(4, 300), NM(60, 150))
    assert (long_groups.mask.unflatten(1, (2, 150)).sum(dim=-1) == 60).all()


def test_sparsegpt_unstructured_total_is_exact_over_blocks() -> None:
    weight, inputs = layer(3, 300)
    pattern = parse_pattern("29%")
    assert int((~run("sparsegpt", weight, inputs, pattern).mask).sum()) == 3 * 300 * 29 // 100


@pytest.mark.parametrize("criterion", ["wanda", "ria", "sparsegpt", "admm"])
def test_beats_magnitude_on_the_layer_output(criterion: str) -> None:
    weight, inputs = layer(32, 64)

    def error(name: str) -> float:
        return float((inputs @ (run(name, weight, inputs, NM(2, 4)).weight - weight).T).square().sum())

    assert error(criterion) < error("magnitude")
    assert error("admm") <= error("sparsegpt") <= error("wanda")


def test_wanda_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [-4.0, 3.0, 2.0, 1.0]])
    norms = torch.tensor([5.0, 2.0, 1.0, 0.5])  # scores 5 4 3 2 and 20 6 2 0.5
    pruned = wanda.prune(weight, norms, NM(2, 4))
    assert pruned.weight.tolist() == [[1, -2, 0, 0], [-4, 3, 0, 0]]


def test_ria_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 6.0]])  # row sums 3 9, column sums 4 8
    norms = torch.tensor([4.0, 1.0])
    # 1/3 + 1/4 = 0.583 and 2/3 + 2/8 = 0.917, times 2 and 1; 3/9 + 3/4 = 1.083 and 6/9 + 6/8 = 1.417, times 2 and 1
    assert ria.prune(weight, norms, NM(1, 2)).weight.tolist() == [[1, 0], [3, 0]]
    assert ria.prune(weight, torch.ones(2), NM(1, 2)).weight.tolist() == [[0, -2], [0, 6]]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_ria_of_empty_rows_and_columns(pattern: Pattern) -> None:
    weight, inputs = layer(16, 64)
    weight[3] = 0
    weight[:, [5, 6]] = -0.0
    pruned = run("ria", weight, inputs, pattern)
    assert torch.isfinite(pruned.weight).all()
    assert not pruned.mask[3].any()
    assert not pruned.mask[:, [5, 6]].any()
    assert pattern.violations(pruned.weight) == 0


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "ria"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_result_does_not_depend_on_how_rows_are_split(
    monkeypatch: pytest.MonkeyPatch, pattern: Pattern, dtype: torch.dtype, criterion: str
) -> None:
    weight, inputs = layer(37, 64, dtype=dtype)
    whole = run(criterion, weight, inputs, pattern)
    monkeypatch.setattr(keep_masks, "_PART", 3 * 64)
    split = run(criterion, weight, inputs, pattern)
    assert split.weight.equal(whole.weight)
    assert split.mask.equal(whole.mask)


@pytest.mark.parametrize("criterion", ["magnitude", "magnitude-matrix", "wanda", "ria"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_extreme_weights(pattern: Pattern, criterion: str) -> None:
    weight, inputs = layer(16, 64)
    weight[0], weight[1, ::2], weight[2, 5] = 0.0, 1e-42, 3e38
    weight[:, 7], weight[3:5, 8:16] = -0.0, torch.tensor(-1e-42)
    pruned = run(criterion, weight, inputs, pattern)
    assert pattern.violations(pruned.weight) == 0
    assert pruned.weight[pruned.mask].equal(weight[pruned.mask])
    assert not torch.signbit(pruned.weight[~pruned.mask]).any()
    assert pruned.mask[2, 5]


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 255, 301])
def test_factor_is_that_of_the_inverse(size: int) -> None:
    """H^-1 = U^T U with U upper triangular, against the inverse in float64."""
    inputs = layer(1, size)[1].double()
    hessian = (2 / len(inputs) * inputs.T @ inputs).float()
    before = hessian.clone()
    found = sparsegpt.damped_inverse(hessian)
    upper = found.factor * found.scale[:, None]
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(size, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(upper.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not upper.tril(-1).any()
    assert hessian.equal(before)


def test_a_new_input_makes_a_new_factor() -> None:
    inputs = layer(1, 16)[1]
    statistic, alone = Gram(16), Gram(16)
    statistic.update(inputs[:20])
    first = statistic.value(sparsegpt.damped_inverse)
    statistic.update(inputs[20:])
    alone.update(inputs)
    second = statistic.value(sparsegpt.damped_inverse)
    torch.testing.assert_close(second.factor, alone.value(sparsegpt.damped_inverse).factor)
    assert not first.factor.equal(second.factor)


def test_layers_that_share_inputs_share_one_inversion(monkeypatch: pytest.MonkeyPatch) -> None:
    statistic = Gram(64)
    statistic.update(layer(4, 64)[1])
    first = statistic.value(sparsegpt.damped_inverse)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *_, **__: pytest.fail("inverted once more"))
    assert statistic.value(sparsegpt.damped_inverse) is first


def test_a_new_input_makes_a_new_value() -> None:
    norm = InputNorm(2)
    norm.update(torch.tensor([[1.0, 2.0]]))
    before = norm.value()
    norm.update(torch.tensor([[3.0, 4.0]]))
    assert before.tolist() == [1, 2]
    assert norm.value().tolist() == pytest.approx([5**0.5, 10**0.5])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("kind", [InputNorm, Gram, Moments])
def test_inputs_that_cannot_be_squared_are_noticed(kind: type[Statistic], bad: float) -> None:
    statistic = kind(3)
    statistic.update(torch.ones(4, 3))
    assert statistic.is_finite()
    statistic.update(torch.tensor([[1.0, bad, 1.0]]))
    assert not statistic.is_finite()


def _worker(rank: int, folder: str, parts: list[Tensor]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for kind in (InputNorm, Gram, Moments):
        statistic = kind(parts[rank].shape[1])
        statistic.update(parts[rank])
        statistic.all_reduce()
        torch.save((statistic.tokens, statistic._mean), f"{folder}/{kind.__name__}-{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", [0, 1, 30])
def test_processes_add_up_what_they_have_seen(tmp_path: Path, first: int) -> None:
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    torch.multiprocessing.spawn(_worker, (str(tmp_path), list(inputs.split([first, 40 - first]))), nprocs=2)
    for kind in (InputNorm, Gram, Moments):
        alone = kind(6)
        alone.update(inputs)
        (tokens, mean), (other_tokens, other) = (torch.load(tmp_path / f"{kind.__name__}-{rank}") for rank in (0, 1))
        assert tokens == other_tokens == 40
        assert mean.equal(other)
        torch.testing.assert_close(mean, alone._mean)


def test_sparsegpt_by_hand() -> None:
    """Two columns of correlated inputs: the survivor takes over what it can, w2 += w1 * H12 / H22."""
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    pruned = sparsegpt.prune(torch.tensor([[1.0, 3.0]]), sparsegpt.damped_inverse(hessian), NM(1, 2))
    # Damping adds 0.02 to the diagonal.
    assert pruned.mask.tolist() == [[False, True]]
    assert pruned.weight[0].tolist() == pytest.approx([0.0, 3 + 1 / 2.02])
    # The second column has nothing after it that could make up for it.
    last = sparsegpt.prune(torch.tensor([[3.0, 1.0]]), sparsegpt.damped_inverse(hessian), NM(1, 2))
    assert last.weight.tolist() == [[3.0, 0.0]]


def test_magnitude_over_the_whole_matrix() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    half = parse_pattern("50%")
    assert magnitude.prune_whole_matrix(weight, None, half).mask.tolist() == [[False] * 4, [True] * 4]
    assert magnitude.prune(weight, None, half).mask.tolist() == [[False, False, True, True]] * 2
    assert magnitude.prune_whole_matrix(weight, None, NM(2, 4)).mask.tolist() == [[False, False, True, True]] * 2


@pytest.mark.parametrize("criterion", ["magnitude", "magnitude-matrix", "wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_zeros_stay_and_go_first(criterion: str, pattern: Pattern) -> None:
    weight, inputs = layer(16, 64)
    already = torch.rand(16, 64, generator=torch.Generator().manual_seed(1)) < 0.4
    weight[already] = 0
    weight[already & (torch.arange(64) % 2 == 0)] = -0.0
    pruned = run(criterion, weight, inputs, pattern)
    assert not pruned.weight[already].any()
    assert not pruned.mask[already].any()
    assert pattern.violations(pruned.weight) == 0
    if isinstance(pattern, NM):  # a group loses no more than the pattern asks for, unless it had more zeros
        before = (~already).unflatten(1, (-1, pattern.m)).sum(dim=-1)
        assert pruned.mask.unflatten(1, (-1, pattern.m)).sum(dim=-1).equal(before.clamp(max=pattern.n))
    zeros = pruned.weight[pruned.weight == 0]
    assert not torch.signbit(zeros).any()


def test_wanda_removes_a_zero_before_a_weight_without_input() -> None:
    pruned = wanda.prune(torch.tensor([[5.0, 1.0, 0.0, 1.0]]), torch.tensor([0.0, 1.0, 1.0, 1.0]), parse_pattern("25%"))
    assert pruned.weight.tolist() == [[5, 1, 0, 1]]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_removes_dead_columns(pattern: Pattern) -> None:
    weight, inputs = layer(16, 64)
    inputs[:, [3, 40, 41]] = 0
    pruned = run("sparsegpt", weight, inputs, pattern)
    assert not pruned.weight[:, [3, 40, 41]].any()
    assert torch.isfinite(pruned.weight).all()
    expected, _ = naive.sparsegpt(weight, inputs, pattern)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=1e-4, atol=1e-4)


def test_sparsegpt_with_no_input_at_all_removes_everything() -> None:
    weight, inputs = layer(4, 8)
    assert not run("sparsegpt", weight, inputs * 0, NM(2, 4)).weight.any()


def test_sparsegpt_says_when_it_took_more_damping() -> None:
    # An eigenvalue of -0.05 against a damping of 0.01 * mean diagonal = 0.01, and of 0.1 on the retry.
    hessian = torch.diag(torch.tensor([2.0, 2.0, 0.025, -0.025]))
    pruned = sparsegpt.prune(torch.ones(1, 4), sparsegpt.damped_inverse(hessian), NM(2, 4))
    assert pruned.note is not None
    assert "10 times the usual damping" in pruned.note
    assert torch.isfinite(pruned.weight).all()


def test_sparsegpt_raises_instead_of_guessing() -> None:
    hessian = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0]))
    with pytest.raises(SppError, match="cannot invert the Hessian"):
        sparsegpt.prune(torch.ones(1, 4), sparsegpt.damped_inverse(hessian), NM(2, 4))


def test_sparsegpt_handles_fewer_tokens_than_features() -> None:
    weight, inputs = layer(16, 64)
    pruned = run("sparsegpt", weight, inputs[:8], NM(2, 4))
    expected, _ = naive.sparsegpt(weight, inputs[:8], NM(2, 4))
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_indivisible_dimension_is_refused(criterion: str) -> None:
    with pytest.raises(UsageError, match="divisible by 4"):
        run(criterion, *layer(4, 10), NM(2, 4))


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 1000))
def test_statistics_do_not_depend_on_the_batches(sizes: list[int], seed: int) -> None:
    inputs = torch.randn(sum(sizes), 6, generator=torch.Generator().manual_seed(seed))
    norm, gram = InputNorm(6), Gram(6)
    for batch in inputs.split(sizes):
        norm.update(batch)
        gram.update(batch)
    assert norm.tokens == len(inputs)
    if len(inputs):
        torch.testing.assert_close(norm.value(), inputs.norm(dim=0) / math.sqrt(len(inputs)))
        torch.testing.assert_close(gram.value(), 2 / len(inputs) * inputs.T @ inputs)
    else:
        with pytest.raises(ValueError, match="no input"):
            norm.value()


def test_statistics_of_half_precision_inputs_are_fp32() -> None:
    inputs = torch.full((300, 2), 3.0, dtype=torch.bfloat16)
    norm = InputNorm(2)
    for batch in inputs.split(1):
        norm.update(batch)
    assert norm.value().dtype == torch.float32
    torch.testing.assert_close(norm.value(), torch.full((2,), 3.0))


def test_gram_restores_the_precision_that_the_user_set() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        Gram(2).update(torch.ones(2, 2))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
