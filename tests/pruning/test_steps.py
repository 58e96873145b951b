"""The steps of pruning in all combinations, and the updates against literal versions."""

from __future__ import annotations

import itertools
from typing import Any

import naive_pruning as naive
import pytest
import torch
from test_swaps import errors, hessian_of, layer

from spp.errors import SppError, UsageError
from spp.patterns import NM, Pattern, parse_pattern
from spp.pruning import least_squares, steps
from spp.pruning.calibration.input_statistics import Gram, Statistic
from spp.pruning.criteria import admm, sparsegpt
from spp.pruning.criteria.result import Pruned
from spp.pruning.options import PruningSettings
from spp.pruning.steps import CRITERIA, REFINEMENTS, UPDATES, steps_of

PATTERNS = [parse_pattern(text) for text in ("50%", "30%", "2:4", "1:4", "16:32")]
COMBINATIONS = list(itertools.product(CRITERIA, ["none", *REFINEMENTS], ["none", *UPDATES]))


def statistics(kinds: list[type[Statistic]], inputs: torch.Tensor) -> dict[type[Statistic], Statistic]:
    found = {kind: kind(inputs.shape[1]) for kind in kinds}
    for statistic in found.values():
        statistic.update(inputs)
    return found


def pruned(weight: torch.Tensor, inputs: torch.Tensor, pattern: Pattern, *names: str) -> Pruned:
    """By the criterion, the refinement and the update of these names."""
    how = steps_of(PruningSettings.build(dict(zip(("criterion", "refine", "update"), names, strict=False))))
    return how.run(weight, statistics(how.statistics, inputs), pattern)


def is_refused(criterion: str, refine: str, update: str) -> bool:
    changed = criterion in ("sparsegpt", "admm")
    return changed and ((refine == "dsnot" and update == "none") or (refine == "none" and update == criterion))


@pytest.mark.parametrize(
    ("criterion", "refine", "update"), COMBINATIONS, ids=["+".join(names) for names in COMBINATIONS]
)
def test_steps_combine(criterion: str, refine: str, update: str) -> None:
    """Every combination obeys the pattern, keeps zeros, and is refused if a step undoes or repeats another."""
    if is_refused(criterion, refine, update):
        with pytest.raises(UsageError, match=r"has changed them; use one of magnitude|makes the update .* itself"):
            steps_of(PruningSettings.build({"criterion": criterion, "refine": refine, "update": update}))
        return
    weight, inputs = layer(12, 64)
    weight[:, ::9], weight[4, 9:32] = 0, 0  # groups of the second have fewer weights than are kept
    for pattern in PATTERNS:
        found = pruned(weight, inputs, pattern, criterion, refine, update)
        transposed = pruned(weight.T.contiguous().T, inputs, pattern, criterion, refine, update)
        assert transposed.mask.eq(found.mask).double().mean() > 0.98
        assert pattern.excess(found.mask) == 0
        assert (found.weight != 0).equal(found.mask)
        assert not found.weight[weight == 0].any()
        assert not torch.signbit(found.weight[~found.mask]).any()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_step_lowers_the_error(pattern: Pattern) -> None:
    weight, inputs = layer(32, 64)

    def error(*names: str) -> float:
        return float(errors(weight, pruned(weight, inputs, pattern, *names).weight, inputs).sum())

    refined = error("wanda", "swaps")
    assert refined < error("wanda")
    for update in UPDATES:
        assert error("wanda", "none", update) < error("wanda")
    for update in ("admm", "least-squares"):  # SparseGPT's settles columns from left to right, and may lose
        assert error("wanda", "swaps", update) < refined
    assert error("wanda", "none", "least-squares") <= 1.001 * error("wanda", "none", "admm")
    assert error("wanda", "none", "least-squares") < error("wanda", "none", "sparsegpt")
    assert error("admm", "swaps", "least-squares") < error("admm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_least_squares_equals_the_normal_equations(pattern: Pattern, dtype: torch.dtype) -> None:
    weight, inputs = layer(20, 64)
    inputs[:, 7] = 0
    weight = weight.to(dtype)
    mask = CRITERIA["magnitude-matrix"].prune(weight, None, pattern).mask  # rows with different counts
    mask[3], mask[4] = False, weight[4] != 0
    found = least_squares.update(weight, mask, least_squares.damped(hessian_of(inputs)))
    torch.testing.assert_close(found.weight.double(), naive.least_squares(weight, mask, inputs), rtol=1e-3, atol=1e-4)
    assert found.mask.equal(mask)


def test_least_squares_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = layer(21, 64)
    mask, hessian = CRITERIA["magnitude-matrix"].prune(weight, None, PATTERNS[0]).mask, hessian_of(inputs)
    whole = least_squares.update(weight, mask, hessian)
    monkeypatch.setattr(least_squares, "_ENTRIES", 5 * 40**2)
    torch.testing.assert_close(least_squares.update(weight, mask, hessian).weight, whole.weight, rtol=1e-3, atol=1e-4)


def test_least_squares_in_float64_where_fp32_has_no_factor() -> None:
    """[[n, 1], [1, a little more than 1 / n]] is positive definite, but for some n not after rounding."""
    for n in range(3, 200):
        above = torch.nextafter(torch.tensor(1 / n), torch.tensor(1.0))
        hessian = torch.tensor([[n, 1.0], [1.0, float(above)]])
        if torch.linalg.cholesky_ex(hessian).info:
            break
    else:
        pytest.fail("fp32 factorized them all")
    every, side = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[1.0, 2.0]])
    found = least_squares.update(side, every, hessian).weight
    torch.testing.assert_close((found.double() @ hessian.double()), (side @ hessian).double())


def test_least_squares_raises_instead_of_guessing() -> None:
    hessian = torch.diag(torch.tensor([1.0, -1.0]))
    with pytest.raises(SppError, match="calibrate with more samples, or use the update admm"):
        least_squares.update(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), hessian)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_admms_update_equals_the_formula(pattern: Pattern) -> None:
    weight, inputs = layer(20, 64)
    mask = CRITERIA["magnitude"].prune(weight, None, pattern).mask
    found = admm.update(weight, mask, admm.scaled_inverse(hessian_of(inputs)))
    expected, _ = naive.admm(weight, inputs, pattern, fixed=mask)
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-3, atol=1e-3)
    assert found.mask.equal(mask)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpts_update_of_its_own_mask_is_its_result(pattern: Pattern) -> None:
    weight, inputs = layer(20, 288)
    inverse = sparsegpt.damped_inverse(hessian_of(inputs))
    own = sparsegpt.prune(weight, inverse, pattern)
    again = sparsegpt.update(weight, own.mask, inverse)
    torch.testing.assert_close(again.weight, own.weight, rtol=1e-4, atol=1e-4)
    assert again.mask.equal(own.mask)


def test_one_product_of_inputs_serves_all_steps() -> None:
    how = steps_of(PruningSettings(criterion="sparsegpt", refine="swaps", update="admm"))
    assert how.statistics == [Gram]
    assert how.title == "SparseGPT, swaps, ADMM's update"


def test_a_step_that_keeps_too_many_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = layer(4, 16)
    everything = Pruned(weight, torch.ones_like(weight, dtype=torch.bool))
    generous: dict[str, Any] = {"prune": lambda *_: everything}
    monkeypatch.setitem(steps.CRITERIA, "wanda", steps.Masking(title="generous", **generous))
    with pytest.raises(SppError, match="generous removed 16 weights fewer than pattern 2:4|by a fault of spp"):
        pruned(weight, inputs, NM(2, 4), "wanda")
    monkeypatch.undo()
    grow = steps.Refining(title="growing", refine=lambda *_: everything, keeps_values=True)
    monkeypatch.setitem(steps.REFINEMENTS, "swaps", grow)
    with pytest.raises(SppError, match="growing kept 64 weights, and not 32"):
        pruned(weight, inputs, NM(2, 4), "wanda", "swaps")
