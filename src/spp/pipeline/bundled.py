"""The small Llama that comes with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def bundled_model() -> Path:
    """Folder of the small Llama that comes with the package."""
    return Path(str(files("spp.pipeline") / "bundled_model"))
