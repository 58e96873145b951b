"""Memory that layers share for what lives within one call of the operator only, such as an expanded weight.

A fresh tensor of a weight's size costs a CPU tens of thousands of page faults, again and again. An accelerator's
allocator keeps such memory itself, so that nothing is done there.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    """One growing buffer per purpose, for each thread its own: threads may be in the operator at the same time."""

    def __init__(self) -> None:
        self.of: dict[str, Tensor] = {}


_buffers = _Buffers()


def scratch(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor, valid until the next call with the same purpose in this thread."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    buffer = _buffers.of.get(purpose)
    if buffer is None or buffer.numel() < size:
        _buffers.of.pop(purpose, None)  # before the new one is there
        buffer = None
        with torch.inference_mode(False):
            buffer = _buffers.of[purpose] = torch.empty(size, dtype=torch.uint8)
    return buffer[:size].view(dtype).view(shape)
