"""The form of a memory estimate, bytes by part, and the free memory of a device."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import psutil
import torch

_CUBLAS = 32 * 2**20  # cuBLAS's workspace on Hopper, which torch counts as a tensor; smaller on other GPUs


@dataclass(frozen=True, kw_only=True)
class MemoryPrediction:
    """The predicted peak of a run on one device, in bytes by part.

    Attributes:
        parts: name of the part -> bytes.
        available: bytes that are free on the device now.
    """

    parts: dict[str, int]
    available: int
    device: str

    @property
    def total(self) -> int:
        """Sum of all parts, in bytes."""
        return sum(self.parts.values())


def libraries(module: str, device: torch.device) -> dict[str, int]:
    """Bytes of Python and everything that a module imports; for a GPU, bytes that libraries take there."""
    import_module(module)
    if device.type == "cpu":
        return {"Python and libraries": psutil.Process().memory_info().rss}
    return {"cuBLAS": _CUBLAS} if device.type == "cuda" else {}


def available_bytes(device: torch.device) -> int:
    """Free memory of the device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
