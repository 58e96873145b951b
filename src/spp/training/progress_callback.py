"""Progress of a training run on the terminal, and an error if its loss is not finite."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spp.errors import SppError

logger = logging.getLogger("spp")

_RISEN = 1.25  # times the loss at first; means of 16 sequences differ by a few percent
_FEWEST, _SEQUENCES = 3, 16


class LossNotFinite(SppError):
    """The loss of a step is NaN or infinite."""


class TrainingProgress(TrainerCallback):
    """Shows a bar with the loss on terminals, measures time, and raises an error if the loss is not finite.

    Args:
        trial_of: learning rate that is being tried, whose rising loss is no reason to warn; None for the run itself.

    Attributes:
        seconds: time in training so far, including the time before a resume.
    """

    def __init__(self, trial_of: float | None = None) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("training" if trial_of is None else f"trying learning rate {trial_of:.2g}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[rate]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.seconds = 0.0
        self._losses: list[float] = []
        self._warned = trial_of is not None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        before = state.log_history[-1].get("seconds", 0.0) if state.log_history else 0.0
        self._started = time.perf_counter() - before
        self._task = self._bar.add_task(
            "", total=state.max_steps, completed=state.global_step, loss=math.nan, rate=math.nan
        )
        if state.is_world_process_zero:
            self._bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.seconds = state.log_history[-1]["seconds"] = time.perf_counter() - self._started
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise LossNotFinite(
                f"the loss is {logs['loss']} at step {state.global_step}; nothing was written. Try a lower "
                "--learning-rate, --dtype float32, or check the data and the model."
            )
        self._watch(logs["loss"], args, state)
        rate = int(state.num_input_tokens_seen) / self.seconds
        self._bar.update(self._task, completed=state.global_step, loss=logs["loss"], rate=rate)

    def _watch(self, loss: float, args: TrainingArguments, state: TrainerState) -> None:
        """Warn, once, where the loss has risen out of the range that it began in."""
        self._losses.append(loss)
        sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        count = max(_FEWEST, math.ceil(_SEQUENCES / sequences))  # steps to take the mean of, as batches differ
        if self._warned or len(self._losses) < 2 * count or not state.is_world_process_zero:
            return
        first, last = (sum(part) / count for part in (self._losses[:count], self._losses[-count:]))
        if last > _RISEN * first:
            self._warned = True
            logger.warning(
                "the loss was %.2f at first and is %.2f after %d steps: the learning rate %g is probably too high for "
                "this model; stop, and try --learning-rate %.1g",
                first, last, state.global_step, args.learning_rate, args.learning_rate / 3,
            )  # fmt: skip

    def close(self) -> None:
        """Remove the bar, however training ended."""
        self._bar.stop()
