"""Checkpoints of a training run that can be killed at any moment: which are complete, and whose they are."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from spp.checkpoint import read_json, sync_folder, write_json
from spp.errors import SppError

logger = logging.getLogger("spp")

_REQUEST, _COMPLETE = "request.json", "complete.json"


class Checkpoints(TrainerCallback):
    """The folder of a run's checkpoints; as a callback, it marks each one once all of it is on disk.

    Args:
        folder: made if it is not there. What a run with another `request` left in it is deleted.
        request: everything that the result depends on, as JSON values.
    """

    def __init__(self, folder: Path, request: dict[str, Any]) -> None:
        self.folder = folder
        if folder.exists() and not self._belongs_to(request):
            logger.info("%s is of a run with other options or data; starting over", folder)
            self.remove()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _REQUEST, request)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None. Incomplete ones, left by a kill, are deleted."""
        found: dict[int, Path] = {}
        for path in self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if (path / _COMPLETE).is_file():
                found[int(path.name.rpartition("-")[2])] = path
            else:
                shutil.rmtree(path)
        return found[max(found)] if found else None

    def remove(self) -> None:
        """Delete all of them."""
        shutil.rmtree(self.folder)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        sync_folder(checkpoint)
        write_json(checkpoint / _COMPLETE, {"step": state.global_step})

    def _belongs_to(self, request: dict[str, Any]) -> bool:
        try:
            return read_json(self.folder / _REQUEST) == request
        except SppError:  # missing or half-written
            return False
