"""What a person sees of a training run while it goes on, and the stop where it has gone wrong."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spp.errors import SppError


class LossNotFinite(SppError):
    """Training has gone wrong."""


class TrainingProgress(TrainerCallback):
    """A bar with the loss on a terminal, nothing elsewhere; the clock; an error where the loss is not finite.

    Attributes:
        seconds: time in training so far; before a resume, what had passed at its checkpoint.
    """

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("training"),
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
        rate = int(state.num_input_tokens_seen) / self.seconds
        self._bar.update(self._task, completed=state.global_step, loss=logs["loss"], rate=rate)

    def close(self) -> None:
        """Take the bar away, however training ended."""
        self._bar.stop()
