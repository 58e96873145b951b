"""Digests that identify models and other inputs by their content: weights, companion files, data."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp.checkpoints.checkpoint import MANIFEST, VERIFICATION, Checkpoint
from spp.checkpoints.companions import CARD, companions
from spp.checkpoints.json_files import read_object
from spp.errors import SppError
from spp.runtime.progress import track_bytes

logger = logging.getLogger("spp")

_CONFIG = ("model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "vocab_size")
_PIECE = 2**22  # bytes that are read and hashed at once
_THREADS = min(8, os.cpu_count() or 1)


def base_fingerprint(folder: Path) -> str:
    """SHA-256 over a model's kind and every tensor's name, shape, dtype and bytes.

    It does not depend on how the checkpoint is sharded or packed, nor on its other files.

    Raises:
        UsageError: the folder holds no safetensors model.
        SppError: a shard is missing or truncated.
    """
    checkpoint = Checkpoint.open(folder)
    return fingerprint(checkpoint, tensor_digests(checkpoint))


def fingerprint(checkpoint: Checkpoint, digests: dict[str, str]) -> str:
    """As `base_fingerprint`, given the digest of every tensor."""
    config = [checkpoint.config.get(name) for name in _CONFIG]
    tensors = [[name, *_facts(checkpoint, name), digests[name]] for name in sorted(checkpoint.names)]
    return json_digest([config, tensors])


def tensor_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Name -> SHA-256 of a tensor's bytes, for all tensors; read once, by several threads.

    Raises:
        SppError: a file has become shorter, or a packed weight is damaged.
    """
    sizes = {name: layout.nbytes for name, layout in checkpoint.layouts.items()}
    with (
        ThreadPoolExecutor(_THREADS) as threads,
        track_bytes("reading the model", sum(sizes.values())) as advance,
    ):
        digests = {}
        for name, digest in zip(sizes, threads.map(lambda name: _digest_in_file(checkpoint, name), sizes), strict=True):
            digests[name] = digest
            advance(sizes[name])
        return digests


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(array)).hexdigest()


WEIGHTS_OF_MODEL = "weights of the model"


def model_digests(folder: Path, weights: str | None = None) -> dict[str, str]:
    """The digests of a model's weights and of its other files, for a request.

    Args:
        folder: of the model.
        weights: its fingerprint, where that is known.

    Raises:
        UsageError, SppError: see `base_fingerprint`.
    """
    return {
        WEIGHTS_OF_MODEL: weights or base_fingerprint(folder),
        "configuration or tokenizer of the model": companions_digest(folder),
    }


def companions_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's files, except its weights and the files that spp adds."""
    paths = [path for path in companions(folder) if path.name not in (MANIFEST, VERIFICATION)]
    return json_digest([[str(path), file_digest(folder / path)] for path in paths])


def json_digest(content: Any) -> str:
    """SHA-256 of content as JSON; what JSON does not know, as text."""
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files in a folder, except hidden files and the model card."""
    left_out = (".", CARD)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(left_out))
    with ThreadPoolExecutor(_THREADS) as threads:
        digests = list(threads.map(file_digest, paths))
    names = [str(path.relative_to(folder)) for path in paths]
    return json_digest([*zip(names, digests, strict=True)])


def warn_of_other_base(adapter: Path, model: str, fingerprint: Callable[[], str]) -> None:
    """Warn if an adapter's spp.json says that it was trained on other weights than the model's.

    Args:
        adapter: the adapter's folder; without spp.json, or if it was converted without its base, there is no warning.
        model: the model as the user named it.
        fingerprint: returns the model's fingerprint (see `base_fingerprint`); called only if the adapter has one.
    """
    manifest = read_object(adapter / MANIFEST) if (adapter / MANIFEST).is_file() else {}
    base = manifest.get("base")
    if isinstance(base, dict) and base.get("fingerprint") != fingerprint():
        logger.warning("the adapter %s was trained on other weights (%s) than %s", adapter, base.get("model"), model)


def _digest_in_file(checkpoint: Checkpoint, name: str) -> str:
    if name in checkpoint.packed:
        return tensor_digest(checkpoint.tensor(name))
    digest, left = hashlib.sha256(), checkpoint.layouts[name].nbytes
    with checkpoint.files[name].open("rb") as file:
        file.seek(checkpoint.offsets[name])
        while left:
            piece = file.read(min(left, _PIECE))
            if not piece:
                raise SppError(f"{checkpoint.files[name]} ends within {name}: it was truncated while it was read")
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _facts(checkpoint: Checkpoint, name: str) -> tuple[list[int], str]:
    layout = checkpoint.layouts[name]
    return list(layout.shape), layout.dtype
