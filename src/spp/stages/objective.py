"""The loss of a training run with a teacher, for transformers' Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from spp.stages.teaching import Lesson, Teacher, predicted


class TaughtTrainer(Trainer):
    """(1 - w) * cross-entropy + w * divergence from the teacher + f * error of the blocks' outputs, per token.

    Args:
        teacher: whom to learn from.
        weight: w, from 0 to 1.
        features: f. The error of a token is the mean over blocks of |h - h_teacher|^2 / |h_teacher|^2.
        arguments: the Trainer's own.
    """

    def __init__(self, teacher: Teacher, weight: float, features: float, **arguments: Any) -> None:
        super().__init__(compute_loss_func=self._loss, **arguments)
        self._teacher, self._weight, self._features = teacher, weight, features
        self._lesson: Lesson | None = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the Trainer does it; the teacher sees the batch first."""
        self._lesson = self._teacher.lesson(inputs)
        if self._features:
            inputs["output_hidden_states"] = True
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        lesson, rows = self._lesson, predicted(labels)
        assert lesson is not None
        logits = outputs.logits[:, :-1][rows]
        count = len(logits) if num_items_in_batch is None else num_items_in_batch
        data = F.cross_entropy(logits.float(), labels[:, 1:][rows], reduction="sum")
        total = (1 - self._weight) * data + self._weight * lesson.divergence(logits)
        if self._features:
            total = total + self._features * _feature_error(outputs.hidden_states[1:], lesson.features, rows)
        return total / count


def _feature_error(states: tuple[Tensor, ...], expected: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    """Sum over tokens of the mean over blocks of the relative squared error."""
    errors = []
    for state, target in zip(states, expected, strict=True):
        target = target.float()
        difference = (state[:, :-1][rows].float() - target).square().sum(dim=-1)
        errors.append(difference / target.square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny))
    return torch.stack(errors).mean(dim=0).sum()
