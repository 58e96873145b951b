"""Divergence from a teacher: by hand, against the whole distribution, and its gradients at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from spp.training.distillation_loss import divergence, divergence_of_top, top_log_probabilities


def logits(count: int = 5, vocabulary: int = 9, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    """Teacher (1/2, 1/2) against student (1/4, 3/4): 1/2 log 2 + 1/2 log 2/3, for two tokens."""
    student = torch.tensor([[0.25, 0.75]]).log().repeat(2, 1)
    teacher = torch.tensor([[7.0, 7.0]]).repeat(2, 1)
    expected = 2 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert float(divergence(student, teacher, 1.0)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_temperature_softens_both_and_keeps_the_size_of_gradients(temperature: float) -> None:
    student, teacher = logits(), logits(seed=1)
    soft = [F.softmax(one.double() / temperature, dim=-1) for one in (teacher, student)]
    expected = temperature**2 * (soft[0] * (soft[0] / soft[1]).log()).sum()
    assert float(divergence(student, teacher, temperature)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_all_tokens_known_it_is_the_whole_divergence(temperature: float) -> None:
    student, teacher = logits().requires_grad_(), logits(seed=1)
    tokens, known = top_log_probabilities(teacher, teacher.shape[1], temperature)
    found = divergence_of_top(student, tokens, known, temperature)
    whole = divergence(student, teacher, temperature)
    torch.testing.assert_close(found, whole, rtol=2e-3, atol=2e-3)  # fp16
    ours, theirs = (torch.autograd.grad(one, student)[0] for one in (found, whole))
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_the_tokens_that_are_not_known_count_as_one() -> None:
    student, teacher = logits(), logits(seed=1)
    tokens, known = top_log_probabilities(teacher, 3, 1.0)
    assert tokens.dtype == torch.int32 and known.dtype == torch.float16
    found = float(divergence_of_top(student, tokens, known, 1.0))
    p, q = (one.softmax(dim=-1) for one in (teacher, student))
    expected = 0.0
    for row in range(len(p)):
        merged = [[float(one[row, token]) for token in tokens[row].tolist()] for one in (p, q)]
        merged = [[*one, 1 - sum(one)] for one in merged]
        expected += sum(a * math.log(a / b) for a, b in zip(*merged, strict=True))
    assert found == pytest.approx(expected, rel=2e-3)
    assert found <= float(divergence(student, teacher, 1.0)) + 1e-3


def test_it_is_zero_and_flat_at_the_teacher() -> None:
    student = logits().requires_grad_()
    for found in (
        divergence(student, student.detach(), 2.0),
        divergence_of_top(student, *top_log_probabilities(student.detach(), 4, 2.0), 2.0),
    ):
        assert abs(found.item()) < 1e-3
        assert torch.autograd.grad(found, student)[0].abs().max() < 5e-3


def test_certain_teachers_leave_finite_gradients() -> None:
    """A probability that rounds to one, so that nothing is left for the others."""
    student = logits().requires_grad_()
    teacher = torch.full((5, 9), -1e4)
    teacher[:, 2] = 0.0
    for found in (
        divergence(student, teacher, 1.0),
        divergence_of_top(student, *top_log_probabilities(teacher, 2, 1.0), 1.0),
        divergence_of_top(student, *top_log_probabilities(teacher, 9, 1.0), 1.0),
    ):
        assert torch.isfinite(found)
        assert torch.isfinite(torch.autograd.grad(found, student)[0]).all()
        assert found.item() == pytest.approx(
            F.cross_entropy(student, torch.full((5,), 2), reduction="sum").item(), rel=1e-4
        )


def test_nobody_has_predicted_anything() -> None:
    assert float(divergence(logits(0), logits(0), 1.0)) == 0.0
    assert float(divergence_of_top(logits(0), *top_log_probabilities(logits(0), 3, 1.0), 1.0)) == 0.0
