"""Where the hidden states between two blocks are kept: one tensor a batch of calibration windows."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

_KEY = "hidden"


class States(Protocol):
    """Hidden states (windows, tokens, features) by batch number."""

    def __getitem__(self, batch: int, /) -> Tensor:
        """Those of one batch; not to be changed in place."""
        ...

    def __setitem__(self, batch: int, hidden: Tensor, /) -> None:
        """Keep those of one batch."""
        ...


class FolderStates:
    """States on disk, one file a batch, so that one batch is in memory, and a killed run finds them again.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, batch: int) -> Tensor:
        return load_file(self._path(batch))[_KEY]

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        save_file({_KEY: hidden.cpu().contiguous()}, self._path(batch))

    def _path(self, batch: int) -> Path:
        return self._folder / f"{batch:06}.safetensors"
