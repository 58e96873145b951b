"""The peak memory of the process, and returning freed memory to the system."""

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
    """Largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: there, getrusage may report the parent process's size
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Return freed memory to the system: all that is free now, and from now on tensors of 1 MiB or more when freed.

    It has an effect with glibc's malloc only, which otherwise keeps freed tensors of up to 32 MiB in a heap that
    fragments. Keeping them took 1.5 times the memory in a training step with activation checkpointing, which was 10 %
    faster; in pruning a 2 GB model it took 1.3 times the memory, and more with every block.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):  # other C libraries lack both
        library.mallopt(_MMAP_THRESHOLD, 2**20)
        library.malloc_trim(0)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of tensors on a CUDA device; for other devices, the peak resident set of the process. In bytes."""
    if device.type != "cuda":
        return peak_rss_bytes()
    import torch

    return torch.cuda.max_memory_allocated(device)
