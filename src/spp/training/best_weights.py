"""The best trained weights of a run, by their loss on held-out examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spp.checkpoints.atomic_folder import new_folder
from spp.checkpoints.fingerprint import file_digest
from spp.checkpoints.safetensors_file import save_tensors
from spp.checkpoints.unfinished import going_on_from, read_record, write_record

_WEIGHTS, _RECORD = "trained.safetensors", "best.json"


class BestWeights(TrainerCallback):
    """Saves the weights with the lowest validation loss, separate from the checkpoints to resume from.

    Args:
        folder: folder to save them to; after a resume, the best ones there are used.
        tensors: function that returns the present values of all that is trained.

    Attributes:
        loss: loss of the best weights so far, in nats per token.
        step: the step that they are from.
    """

    def __init__(self, folder: Path, tensors: Callable[[], dict[str, Tensor]]) -> None:
        self._folder, self._tensors = folder, tensors
        self.loss, self.step = math.inf, 0
        if (record := folder / _RECORD).is_file():
            found = read_record(record)
            with going_on_from(weights := folder / _WEIGHTS):
                if file_digest(weights) != found["sha256"]:
                    raise ValueError("its digest is another one")
            self.loss, self.step = found["loss"], found["step"]

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (metrics or {}).get("eval_loss", math.nan)
        if not loss < self.loss:
            return
        self.loss, self.step = loss, state.global_step
        tensors = self._tensors()  # of which every process may have a part
        if state.is_world_process_zero:
            with new_folder(self._folder, overwrite=True) as partial:
                save_tensors(partial / _WEIGHTS, tensors)
                digest = file_digest(partial / _WEIGHTS)
                write_record(partial / _RECORD, {"loss": loss, "step": state.global_step, "sha256": digest})

    def tensors(self) -> dict[str, Tensor]:
        """The best weights."""
        with going_on_from(path := self._folder / _WEIGHTS):
            return load_file(path)
