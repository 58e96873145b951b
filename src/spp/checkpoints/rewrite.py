"""Write a copy of a model folder with new values in some tensors: same files, names, shapes and dtypes.

Other tensors keep their bytes, so no round trip through a model class can lose a tied weight, an unusual dtype or a
setting.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp.checkpoints.checkpoint import ADAPTER, INDEX, MANIFEST, SINGLE, VERIFICATION, Checkpoint, is_plain
from spp.checkpoints.companions import companions
from spp.checkpoints.fingerprint import tensor_digest
from spp.checkpoints.json_files import sync, write_json
from spp.checkpoints.packed_archive import dense_name
from spp.checkpoints.safetensors_file import TensorFile, in_dtype
from spp.errors import SppError
from spp.ops.dtypes import dtype_name
from spp.ops.zero_proof import may_hold_negative_zeros
from spp.ops.zeros import canonical_zeros, is_float

# Side files of ours are written anew, and an adapter that lies there is not of the new model.
_NOT_COPIED = (MANIFEST, VERIFICATION, ADAPTER)
# Engines refuse a model that announces a sparse format; ours are plain.
_ANNOUNCEMENTS = {"sparsity_config", "compression_config"}


class Rewriting:
    """The files of a new model, laid out like the checkpoint's, and filled in any order, in several runs if needed.

    Args:
        checkpoint: the model to copy.
        folder: the new model's folder; files that an earlier run laid out there are continued.
        dtype: dtype of all float tensors in the new model; None keeps each tensor's own.
        added: name of a new tensor -> tensor of the checkpoint that it is like, and beside which it is stored.
        settings: entries of config.json to set.

    Attributes:
        layouts: tensor name -> layout in the new model.

    Raises:
        SppError: the disk has no room for them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        dtype: torch.dtype | None = None,
        *,
        added: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._checkpoint, self._folder, self._dtype, self._settings = checkpoint, folder, dtype, settings or {}
        like = {name: name for name in checkpoint.names} | dict(added or {})
        layouts = {name: checkpoint.layouts[model] for name, model in like.items()}
        self.layouts = {name: in_dtype(layout, dtype) if dtype else layout for name, layout in layouts.items()}
        self._size = sum(layout.nbytes for layout in self.layouts.values())
        self._files: dict[str, TensorFile] = {}
        try:
            shards: dict[Path, list[str]] = {}
            for name, model in like.items():
                shards.setdefault(checkpoint.files[model], []).append(name)
            for path, names in shards.items():
                file = TensorFile(folder / dense_name(path.name), {name: self.layouts[name] for name in names})
                self._files |= dict.fromkeys(names, file)
        except OSError as error:
            raise SppError(f"{folder.parent}: no room for {self._size / 1e9:.3g} GB of weights ({error})") from error

    def write(self, name: str, tensor: Tensor) -> str:
        """Write a tensor, of the shape and dtype in `layouts`, with every zero as +0.0; return its SHA-256."""
        signed = is_float(tensor) and may_hold_negative_zeros(tensor)
        written = canonical_zeros(tensor) if signed else tensor
        self._files[name].write(name, written)
        return tensor_digest(written)

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor as it lies in its file."""
        return self._files[name].digest(name)

    def copy(self, name: str) -> None:
        """Copy a tensor byte for byte; a packed one is expanded."""
        checkpoint = self._checkpoint
        if name in checkpoint.packed:
            self._files[name].write(name, checkpoint.tensor(name))
        else:
            self._files[name].copy(name, checkpoint.files[name], checkpoint.offsets[name])

    def sync(self) -> None:
        """Make what has been written survive a crash of the machine."""
        for path in {file.path for file in self._files.values()}:
            sync(path)

    def finish(self) -> None:
        """Write the index and the model's other files (config, tokenizer)."""
        write_companions(self._checkpoint, self._folder, self._dtype, self._settings)
        files = {name: file.path.name for name, file in self._files.items()}
        if set(files.values()) != {SINGLE}:
            write_json(self._folder / INDEX, {"metadata": {"total_size": self._size}, "weight_map": files})


def write_companions(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: torch.dtype | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Copy the files of a model besides its weights.

    In the configuration, a sparsity config is left out, and the dtype is replaced if `dtype` is given, and so are
    `settings`.
    """
    for path in companions(checkpoint.folder):
        if path.name not in _NOT_COPIED:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.folder / path, folder / path)
    config = {
        name: value
        for name, value in checkpoint.config.items()
        if name not in _ANNOUNCEMENTS and not (name == "quantization_config" and is_plain(value))
    }
    config |= settings or {}
    if dtype is not None:
        config = _with_dtype(config, dtype_name(dtype))
    if config != checkpoint.config:
        write_json(folder / "config.json", config)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration with another dtype, also in configurations of parts, and under the old key torch_dtype."""
    changed = {name: _with_dtype(value, dtype) if isinstance(value, dict) else value for name, value in config.items()}
    return changed | {name: dtype for name in ("dtype", "torch_dtype") if isinstance(config.get(name), str)}
