"""Write a model folder again with other numbers in some tensors: same files, names, shapes and dtypes.

Everything that is not changed keeps its bytes (but for -0.0, which becomes +0.0), so no round trip through a model
class can lose a tied weight, an unusual dtype or a setting.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from spp.archive import dense_name
from spp.checkpoint import INDEX, MANIFEST, SINGLE, Checkpoint, canonical_zeros, write_json
from spp.progress import track

# What a model folder holds besides its weights and belongs to every model made from it.
_COMPANIONS = {".json", ".model", ".txt", ".jinja", ".py", ".tiktoken"}
_LEGAL = ("LICENSE", "LICENCE", "NOTICE")
# Engines refuse a model that announces a sparse format; ours are plain.
_ANNOUNCEMENTS = {"sparsity_config", "compression_config"}


def tensor_name(checkpoint: Checkpoint, module: str) -> str | None:
    """The checkpoint's name of a module's weight, or None; that of a bare base model lacks the first parts."""
    parts = f"{module}.weight".split(".")
    candidates = (".".join(parts[start:]) for start in range(len(parts) - 1))
    return next((name for name in candidates if name in checkpoint.files), None)


def rewrite(
    checkpoint: Checkpoint, folder: Path, changes: dict[str, Callable[[Tensor], Tensor]], description: str
) -> None:
    """Write the checkpoint to `folder`, one shard in memory at a time, with its companions (config, tokenizer).

    Args:
        checkpoint: the model to start from.
        folder: where to write; an existing folder.
        changes: tensor name -> function from the old tensor to the new one, of the same shape and dtype.
        description: what the progress bar says.
    """
    written: dict[str, str] = {}
    size = 0
    for path, names in track(checkpoint.shards.items(), description, total=len(checkpoint.shards)):
        shard = {}
        for name in names:
            before = checkpoint.tensor(name)
            shard[name] = canonical_zeros(changes[name](before) if name in changes else before)
        file = dense_name(path.name)
        save_file(shard, folder / file, metadata={"format": "pt"})
        written |= dict.fromkeys(names, file)
        size += sum(tensor.nbytes for tensor in shard.values())
    write_companions(checkpoint, folder)
    if set(written.values()) != {SINGLE}:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": written})


def write_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy what belongs to a model besides its weights; an announcement of a sparse format is left out."""
    for path in sorted(checkpoint.folder.iterdir()):
        kept = path.suffix in _COMPANIONS or path.name.upper().startswith(_LEGAL)
        weights_of_others = path.name.endswith(".bin.index.json")
        if path.is_file() and kept and path.name not in (MANIFEST, INDEX) and not weights_of_others:
            shutil.copyfile(path, folder / path.name)
    if _ANNOUNCEMENTS & checkpoint.config.keys():
        plain = {name: value for name, value in checkpoint.config.items() if name not in _ANNOUNCEMENTS}
        write_json(folder / "config.json", plain)
