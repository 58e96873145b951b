"""Train with transformers' Trainer: resume, find a batch size that fits, and return the best trained weights."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, set_seed
from transformers.trainer_callback import ProgressCallback

from spp.data.examples import Example
from spp.errors import SppError
from spp.ops.zeros import all_finite
from spp.runtime.files import is_disk_full, writing
from spp.training.best_weights import BestWeights
from spp.training.checkpoints import Checkpoints
from spp.training.options import TrainOptions
from spp.training.progress_callback import LossNotFinite, TrainingProgress
from spp.training.sharding import set_trained, whole_trained
from spp.training.teacher import Teacher
from spp.training.trainer import Item, SppTrainer
from spp.training.trainer_arguments import batching, smaller_batch, training_arguments

logger = logging.getLogger("spp")


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The result of a training run.

    Attributes:
        trained: name of every trained parameter -> its best value if examples were held out, else its last one.
        steps: optimizer steps.
        tokens: tokens trained on, without padding; like `seconds`, it includes the time before a resume.
        seconds: time in training.
        losses: (step, loss), for every step.
        validation: (step, loss on the held-out examples), for every evaluation.
        best_step: the step that `trained` is from; None if no examples were held out.
        device: device of the training.
    """

    trained: dict[str, Tensor]
    steps: int
    tokens: int
    seconds: float
    losses: list[tuple[float, float]]
    validation: list[tuple[float, float]]
    best_step: int | None
    device: torch.device


class TrainingRun:
    """A training run; it is tried again with fewer sequences at once if memory does not suffice.

    Args:
        model: with a new adapter, or with values to train; it is trained in place.
        items: examples to train on, with their indices.
        held_out: examples to evaluate on; may be empty.
        teacher: teacher to distil from, or None.
        options: options of the run.
        rate: the peak learning rate.
        folder: folder of its checkpoints.
        device: device to train on.
        gradient_checkpointing: whether to recompute activations in backward.
        trial: whether this run only tries a learning rate.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        items: Sequence[Item],
        held_out: Sequence[Example],
        teacher: Teacher | None,
        options: TrainOptions,
        rate: float,
        *,
        folder: Path,
        device: torch.device,
        gradient_checkpointing: bool,
        trial: bool = False,
    ) -> None:
        self._model, self._items, self._held_out, self._teacher = model, items, held_out, teacher
        self._options, self._rate, self._device = options, rate, device
        self._gradient_checkpointing, self._trial = gradient_checkpointing, trial
        # To start over from. On a CPU, memory that does not suffice ends the process before it is known.
        self._first = whole_trained(model) if device.type != "cpu" else {}
        self._folder, self._checkpoints = folder, Checkpoints(folder)

    def run(self) -> TrainingResult:
        """Train to the end.

        Raises:
            LossNotFinite: a loss or weight that is not finite.
        SppError: no batch fits into memory, or the disk is full.
        """
        sequences: int | None = batching(self._options)[0]
        while sequences is not None:
            trainer, watch, latest = self._trainer(sequences)
            if self._runs_through(trainer, watch, latest):
                return self._finished(trainer, watch)
            del trainer, watch  # what they hold is in the way of the next try
            torch.cuda.empty_cache()
            set_trained(self._model, self._first)
            if fewer := smaller_batch(self._options, sequences):
                logger.warning("%d sequences at once do not fit into memory; going on with %d", sequences, fewer)
            sequences = fewer
        raise SppError(
            "out of memory: lower --device-batch-size (the result stays the same) or --window, or pass "
            "--gradient-checkpointing"
        )

    def _trainer(self, sequences: int) -> tuple[SppTrainer, TrainingProgress, Path | None]:
        """The Trainer, and the checkpoint to resume from."""
        options = self._options
        set_seed(options.seed)
        if options.report_to != "none":
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(options.out.with_name(f"{options.out.name}.logs")))
        arguments = training_arguments(
            options,
            self._rate,
            self._folder,
            self._model.dtype,
            self._device,
            sequences,
            gradient_checkpointing=self._gradient_checkpointing,
            evaluate_first=not self._trial,
        )
        with arguments.main_process_first(local=False):  # the first process tidies up, the others find it done
            latest = self._checkpoints.latest()
        if latest is not None:
            arguments.eval_on_start = False
        watch = TrainingProgress(self._rate if self._trial else None)
        best = [self._best()] if self._held_out else []
        trainer = SppTrainer(
            self._items,
            self._held_out,
            self._teacher,
            options,
            model=self._model,
            args=arguments,
            callbacks=[watch, self._checkpoints, *best],
        )
        for printer in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printer)
        return trainer, watch, latest

    def _runs_through(self, trainer: SppTrainer, watch: TrainingProgress, latest: Path | None) -> bool:
        """Train; False if memory does not suffice."""
        if latest is not None:
            logger.info("resuming from %s", latest)
        try:
            with writing(self._folder):  # torch.save and safetensors have errors of their own for what the disk refuses
                trainer.train(resume_from_checkpoint=str(latest) if latest else None)
        except torch.OutOfMemoryError:
            return False
        except OSError as error:
            if not is_disk_full(error):
                raise
            raise SppError(
                f"no space is left on the disk of {self._folder} ({error}); earlier checkpoints are kept: make room, "
                "and repeat the command to go on"
            ) from error
        except LossNotFinite as error:
            examples = ", ".join(map(str, trainer.examples_of_the_step))
            good = self._checkpoints.latest()
            raise LossNotFinite(
                f"{error} Its examples, counted from 0: {examples}. "
                + (f"The last good checkpoint is {good}" if good else "There is no checkpoint before it")
            ) from error
        finally:
            watch.close()
        return True

    def _finished(self, trainer: SppTrainer, watch: TrainingProgress) -> TrainingResult:
        history, best_step = trainer.state.log_history, None
        if self._held_out:
            if not any("eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in history):
                trainer.evaluate()
            trainer.accelerator.wait_for_everyone()  # for the one that writes it
            best = self._best()
            if not math.isfinite(best.loss):
                raise LossNotFinite(
                    "the loss on held-out examples was never finite; nothing was written; check the data"
                )
            if best.step == 0 and trainer.is_world_process_zero():
                logger.warning(
                    "training only made the loss on held-out examples worse (it was %.4f before), so the weights stay "
                    "as they were: try a --learning-rate lower than %.2g, or other data", best.loss, self._rate,
                )  # fmt: skip
            best_step, trained = best.step, best.tensors()
        else:
            trained = whole_trained(self._model)
        _require_finite(trained)
        return TrainingResult(
            trained=trained,
            steps=trainer.state.global_step,
            tokens=int(trainer.state.num_input_tokens_seen),
            seconds=watch.seconds,
            losses=[(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
            validation=[(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry],
            best_step=best_step,
            device=trainer.args.device,
        )

    def _best(self) -> BestWeights:
        return BestWeights(self._folder / "best", lambda: whole_trained(self._model))


def _require_finite(trained: dict[str, Tensor]) -> None:
    """Check the weights after the last step, whose update no loss depends on."""
    if not all(map(all_finite, trained.values())):
        raise LossNotFinite(
            "the last step made the trained weights NaN or infinite; nothing was written. Lower --learning-rate"
        )
