"""Checkpoints of a training run that can be killed at any moment: which are complete, and whose they are."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from spp.checkpoints.atomic_folder import new_folder
from spp.checkpoints.json_files import read_json, sync_folder, write_json
from spp.errors import SppError, UsageError

logger = logging.getLogger("spp")

_REQUEST, _COMPLETE = "request.json", "complete.json"


class Checkpoints(TrainerCallback):
    """The folder of a run's checkpoints; as a callback, it marks each one once all of it is on disk.

    Args:
        folder: made if it is not there.
        request: everything that the result depends on, as JSON values.
        overwrite: whether checkpoints of a run with another `request` may be deleted.

    Raises:
        UsageError: the folder holds something that is no run's, or checkpoints of another one.
    """

    def __init__(self, folder: Path, request: dict[str, Any], *, overwrite: bool) -> None:
        self.folder = folder
        found = self._request()
        if found == request:
            return
        if found is not None:
            if not overwrite and self.latest():
                raise UsageError(
                    f"{folder} holds checkpoints of a run with {_differences(found, request)}; repeat its command to "
                    "go on with it, name another output, or pass --overwrite to start over"
                )
            logger.info("%s is of a run with other options or data; starting over", folder)
        elif folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise UsageError(f"{folder} is where checkpoints go, and it holds something else; name another output")
        with new_folder(folder, overwrite=True) as partial:
            write_json(partial / _REQUEST, request)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None. Incomplete and damaged ones, left by a kill, are deleted."""
        found: dict[int, Path] = {}
        for path in self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if _is_complete(path):
                found[int(path.name.rpartition("-")[2])] = path
            else:
                shutil.rmtree(path)
        return found[max(found)] if found else None

    def remove(self) -> None:
        """Delete all of them."""
        shutil.rmtree(self.folder)

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
            sync_folder(checkpoint)
            write_json(checkpoint / _COMPLETE, _sizes(checkpoint))

    def _request(self) -> dict[str, Any] | None:
        try:
            return read_json(self.folder / _REQUEST)
        except SppError:  # missing or damaged
            return None


def _differences(found: dict[str, Any], asked: dict[str, Any]) -> str:
    """What a run with checkpoints was asked for that is not asked for now, in words."""
    named = {"base": "another model", "examples": "other examples"}
    options = [
        f"{name.replace('_', '-')} {found.get(name)} (not {asked.get(name)})"
        for name in dict.fromkeys([*found, *asked])
        if name not in named and found.get(name) != asked.get(name)
    ]
    return ", ".join([*(words for name, words in named.items() if found.get(name) != asked.get(name)), *options])


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Size in bytes of every file but the mark itself."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != _COMPLETE]
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}


def _is_complete(checkpoint: Path) -> bool:
    try:
        return read_json(checkpoint / _COMPLETE) == _sizes(checkpoint)
    except SppError:  # missing or damaged
        return False
