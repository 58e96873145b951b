"""Scratch memory that layers share for tensors used within one call of the operator, such as an expanded weight.

On a CPU, a new tensor of a weight's size costs tens of thousands of page faults at every call. The allocators of
accelerators reuse such memory themselves, so there it is a plain new tensor.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    """A growing buffer for each purpose and thread: several threads may run the operator at the same time."""

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
        _buffers.of.pop(purpose, None)  # free it before the new one is allocated
        buffer = None
        with torch.inference_mode(False):
            buffer = _buffers.of[purpose] = torch.empty(size, dtype=torch.uint8)
    return buffer[:size].view(dtype).view(shape)
