"""Tell models apart: which base an adapter was trained on."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch
from torch import Tensor

from spp.checkpoints.checkpoint import MANIFEST, Checkpoint
from spp.checkpoints.json_files import read_object
from spp.ops.dtypes import FLOATS

logger = logging.getLogger("spp")

_CONFIG = ("model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "vocab_size")


def base_fingerprint(folder: Path) -> str:
    """SHA-256 over a model's kind, its tensors' names, shapes and dtypes, and the first row of each.

    The first rows tell models of one architecture apart, and the same model pruned in two ways, for the price of a
    few kilobytes per tensor. How a checkpoint is sharded or packed does not count.

    Raises:
        UsageError: the folder holds no safetensors model.
        SppError: a shard is missing or truncated.
    """
    checkpoint = Checkpoint.open(folder)
    tensors: dict[str, str] = {}
    for name, shape, row in checkpoint.heads():
        dtype = FLOATS[row.dtype].safetensors if row.dtype in FLOATS else str(row.dtype)
        tensors[name] = _sha256([name, list(shape), dtype], row)
    config = [checkpoint.config.get(name) for name in _CONFIG]
    return _sha256([config, sorted(tensors.items())])


def warn_of_other_base(adapter: Path, model: str, fingerprint: str) -> None:
    """Warn where an adapter's side file says that it was trained on other weights than those of this fingerprint.

    Args:
        adapter: its folder; one without a side file, or converted without its base, says nothing.
        model: what the user calls the model.
        fingerprint: the model's.
    """
    manifest = read_object(adapter / MANIFEST) if (adapter / MANIFEST).is_file() else {}
    base = manifest.get("base")
    if isinstance(base, dict) and base.get("fingerprint") != fingerprint:
        logger.warning("the adapter %s was trained on other weights (%s) than %s", adapter, base.get("model"), model)


def _sha256(facts: list, tensor: Tensor | None = None) -> str:
    digest = hashlib.sha256(json.dumps(facts).encode())
    if tensor is not None:
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
