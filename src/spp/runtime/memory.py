"""How much memory the process has used at most, and how it is made to give some back."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD in glibc's malloc.h


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far; the system counts in KiB, macOS in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where getrusage may report the size of the process that started this one
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Make this process give freed memory back to the system: all there is now, and tensors from 1 MiB on at once.

    Nothing happens where malloc is not glibc's, which keeps tensors of up to 32 MiB for later, in a heap that
    fragments. In a training step with activation checkpointing that took 1.5 times the memory, and was 10 % faster; in
    pruning a 2 GB model, 1.3 times, and more with every block.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):  # other C libraries have neither
        library.mallopt(_MMAP_THRESHOLD, 2**20)
        library.malloc_trim(0)


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes that tensors held at once on a CUDA device; for others the peak of the resident set."""
    if device.type != "cuda":
        return peak_rss_bytes()
    import torch

    return torch.cuda.max_memory_allocated(device)
