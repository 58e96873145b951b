"""What a memory estimate is made of: bytes by part, and what is free on the device."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import psutil
import torch

_CUBLAS = 32 * 2**20  # its workspace on Hopper, which torch counts as a tensor; less elsewhere


@dataclass(frozen=True, kw_only=True)
class MemoryPrediction:
    """The predicted peak of a run on one device, in bytes by part.

    Attributes:
        parts: what -> bytes.
        available: free on the device now.
    """

    parts: dict[str, int]
    available: int
    device: str

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def libraries(module: str, device: torch.device) -> dict[str, int]:
    """Bytes of Python and of all that a module imports, or of what they take on a GPU."""
    import_module(module)
    if device.type == "cpu":
        return {"Python and libraries": psutil.Process().memory_info().rss}
    return {"cuBLAS": _CUBLAS} if device.type == "cuda" else {}


def available_bytes(device: torch.device) -> int:
    """Free memory of the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
