"""The user's cache: a folder of safetensors files that save repeated work; it may be deleted at any time.

It is the folder that the environment variable `SPP_CACHE` names, else `spp` in `XDG_CACHE_HOME`, else `~/.cache/spp`.
A problem with the cache costs time only: an entry that cannot be read is made again, and one that cannot be written is
dropped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger("spp")


def cache_folder() -> Path:
    """Where the cache is; the folder need not exist yet.

    Raises:
        RuntimeError: no variable names it, and the user has no home.
    """
    if named := os.environ.get("SPP_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spp"


def cache_name(kind: str, facts: Any) -> str:
    """The name of an entry: its kind, and the SHA-256 of everything that its content depends on, as JSON values."""
    text = json.dumps(facts, sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()}.safetensors"


def read_entry(name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """An entry's tensors and its other facts; None if there is no such entry, or it is damaged."""
    try:
        path = cache_folder() / name
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, RuntimeError, SafetensorError) as error:
        logger.info("the cached %s cannot be read and is made again (%s)", name, error)
        return None


def write_entry(name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Store an entry. It is written to a folder of its own and renamed: other processes may write the same entry."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
            save_file(dict(tensors), Path(partial) / name, dict(facts))
            (Path(partial) / name).replace(folder / name)
    except (OSError, RuntimeError, SafetensorError) as error:
        logger.info("%s is not kept in the cache (%s)", name, error)
