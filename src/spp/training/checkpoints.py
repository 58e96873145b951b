"""The checkpoints of a training run, and which of them are complete: the run may be killed at any time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from spp.checkpoints.fingerprint import file_digest
from spp.checkpoints.json_files import read_json, sync_folder, write_json
from spp.errors import SppError
from spp.runtime.files import writing

_COMPLETE = "complete.json"


class Checkpoints(TrainerCallback):
    """The checkpoints of a run; as a callback, it marks each one when it is completely on disk.

    Args:
        folder: folder of the checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None. Incomplete and damaged ones, left by a kill, are deleted."""
        found: dict[int, Path] = {}
        for path in self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if path.name.rpartition("-")[2].isdecimal() and _is_complete(path):
                found[int(path.name.rpartition("-")[2])] = path
            else:
                shutil.rmtree(path)
        return found[max(found)] if found else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # After the last step the adapter itself is written. The Trainer wants a checkpoint there, too, but resumed
        # from it would train one step more.
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.distributed_state is not None:
            args.distributed_state.wait_for_everyone()  # each process writes a file of its own
        if state.is_world_process_zero:
            checkpoint = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            with writing(checkpoint):
                sync_folder(checkpoint)
            write_json(checkpoint / _COMPLETE, _digests(checkpoint))


def _digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every file except the mark itself."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != _COMPLETE]
    return {str(path.relative_to(checkpoint)): file_digest(path) for path in files}


def _is_complete(checkpoint: Path) -> bool:
    try:
        return read_json(checkpoint / _COMPLETE) == _digests(checkpoint)
    except (SppError, OSError):  # missing or damaged
        return False
