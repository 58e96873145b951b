"""The files of a model besides its weights: configuration, tokenizer, templates, code, licences."""

from __future__ import annotations

from pathlib import Path

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz")
_INDEX = ".index.json"
CARD = "README.md"


def companions(folder: Path) -> list[Path]:
    """The files that belong to a model besides its weights, relative to its folder, in order.

    Hidden files, indices of weights and the model card, which speaks of this one model, are left out.
    """
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if _belongs(path))


def _belongs(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and not path.name.endswith((*_WEIGHTS, _INDEX)) and path.name != CARD
