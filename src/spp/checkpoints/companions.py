"""What a model folder holds besides its weights: configuration, tokenizer, templates, code, licences."""

from __future__ import annotations

from pathlib import Path

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz")
_INDEX = ".index.json"
CARD = "README.md"


def companions(folder: Path) -> list[Path]:
    """The files that belong to a model besides its weights, relative to its folder, in order.

    All files in the folder itself and in folders in it that hold no weights, which would be another model's. Left out
    are hidden files, weights, their indices, and the model card, which speaks of this one model.
    """
    found: list[Path] = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        inside = [path] if path.is_file() else list(path.rglob("*")) if path.is_dir() else []
        if path.is_dir() and any(_is_weights(one) for one in inside):
            continue
        found += [one.relative_to(folder) for one in inside if one.is_file() and _belongs(one)]
    return sorted(found)


def _belongs(path: Path) -> bool:
    return not path.name.startswith(".") and not _is_weights(path) and path.name != CARD


def _is_weights(path: Path) -> bool:
    return path.name.endswith((*_WEIGHTS, _INDEX))
