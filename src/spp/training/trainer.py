"""transformers' Trainer with our batches, a distillation loss, a validation loss, and checkpoints without the base."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from spp.checkpoints.safetensors_file import save_tensors
from spp.data.examples import Example, collate
from spp.runtime import distributed
from spp.training.options import TrainingSettings
from spp.training.sharding import set_trained, trained_parameters, whole_trained
from spp.training.teacher import LiveTeacher, Teacher, TeacherBatch, predicted

Item = tuple[int, Example]
"""An example, and its index in the data."""

_NUMBERS = "examples"
_TRAINED = "trained.safetensors"


class SppTrainer(Trainer):
    """Without a teacher, the model's own loss. With one, per token

        (1 - w) * cross-entropy + w * divergence from the teacher + f * error of the blocks' outputs

    where the last is the mean over blocks of |h - h_teacher|^2 / |h_teacher|^2.

    Args:
        items: examples to train on, with their indices.
        held_out: examples to evaluate on; may be empty.
        teacher: teacher to distil from, or None.
        settings: teacher_weight (w) and teacher_features (f).
        arguments: the Trainer's own.
    """

    def __init__(
        self,
        items: Sequence[Item],
        held_out: Sequence[Example],
        teacher: Teacher | None,
        settings: TrainingSettings,
        **arguments: Any,
    ) -> None:
        loss = {} if teacher is None else {"compute_loss_func": self._loss}
        super().__init__(
            train_dataset=items,  # pyright: ignore[reportArgumentType]
            eval_dataset=held_out or None,  # pyright: ignore[reportArgumentType]
            data_collator=_batch,
            **loss,
            **arguments,
        )
        if self.is_fsdp_enabled and isinstance(teacher, LiveTeacher):
            teacher.divide(self.args.device)
        self._held_out, self._teacher, self._teacher_batch = held_out, teacher, None
        self._weight, self._features = settings.teacher_weight, settings.teacher_features
        self._last: deque[Tensor] = deque(maxlen=self.args.gradient_accumulation_steps)

    @property
    def examples_of_the_step(self) -> list[int]:
        """Indices of the examples of the last step on this process, in order."""
        return [number for numbers in self._last for number in numbers.tolist()]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer, but the teacher gets the batch first."""
        self._last.append(inputs.pop(_NUMBERS))
        if self._teacher is not None:
            self._teacher_batch = self._teacher.teacher_batch(inputs, self._last[-1].tolist())
            if self._features:
                inputs["output_hidden_states"] = True
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        teacher_batch: TeacherBatch | None = self._teacher_batch
        assert teacher_batch is not None
        rows = predicted(labels)
        logits = outputs.logits[:, :-1][rows]
        count = len(logits) if num_items_in_batch is None else num_items_in_batch
        data = F.cross_entropy(logits.float(), labels[:, 1:][rows], reduction="sum")
        total = (1 - self._weight) * data + self._weight * teacher_batch.divergence(logits)
        if self._features:
            total = total + self._features * _feature_error(outputs.hidden_states[1:], teacher_batch.features, rows)
        return total / count

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The weights of a checkpoint: an adapter as PEFT saves it, or else what is trained, without the base."""
        if isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
            return
        assert self.model is not None and output_dir is not None
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # Of a sharded model only the state dict that the Trainer gathered is whole here.
        held = whole_trained(self.model) if state_dict is None else state_dict
        save_tensors(folder / _TRAINED, {name: held[name] for name in trained_parameters(self.model)})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """What `_save` saved."""
        if isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            trained: Any = model or self.model
            set_trained(trained, load_file(Path(resume_from_checkpoint) / _TRAINED))

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The loss on the held-out examples, in nats per token, without the teacher's part."""
        metrics = {"eval_loss": self._validation_loss()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """The validation loss; each process computes some of the batches, and all get the same result."""
        model: Any = self.model_wrapped
        size = self.args.per_device_train_batch_size
        batches = [self._held_out[first : first + size] for first in range(0, len(self._held_out), size)]
        was_training = model.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=distributed.device())
        for first in range(0, len(batches), distributed.world_size()):
            number = first + distributed.rank()
            # The last batch again, where there is none left: those who share a model wait for each other.
            batch = self._prepare_inputs(collate(batches[min(number, len(batches) - 1)]))  # pyright: ignore[reportArgumentType]
            labels = batch.pop("labels")
            rows = predicted(labels)
            logits = model(**batch).logits[:, :-1][rows]
            if number < len(batches):
                sums[0] += F.cross_entropy(logits.float(), labels[:, 1:][rows], reduction="sum").item()
                sums[1] += len(logits)
        model.train(was_training)
        total, count = distributed.all_reduce(sums).tolist()
        return total / count


def _batch(items: Sequence[Item]) -> dict[str, Tensor]:
    return {**collate([one for _, one in items]), _NUMBERS: torch.tensor([number for number, _ in items])}


def _feature_error(states: tuple[Tensor, ...], expected: tuple[Tensor, ...], rows: Tensor) -> Tensor:
    """Sum over tokens of the mean over blocks of the relative squared error."""
    errors = []
    for state, target in zip(states, expected, strict=True):
        target = target.float()
        difference = (state[:, :-1][rows].float() - target).square().sum(dim=-1)
        errors.append(difference / target.square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny))
    return torch.stack(errors).mean(dim=0).sum()
