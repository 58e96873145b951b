"""The peak memory of the process, and returning freed memory to the system."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


# In glibc's malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX; and what the last one is by default.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MAPPINGS = 65536


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
    if library := _glibc():
        library.mallopt(_MMAP_MAX, _MAPPINGS)
        library.mallopt(_MMAP_THRESHOLD, 2**20)
        library.malloc_trim(0)


@contextmanager
def freed_memory_kept(keep: bool) -> Iterator[None]:
    """Context manager in which freed tensors stay in the process, for the next ones, and are returned at the end.

    It has an effect with glibc's malloc only, which otherwise maps tensors above 32 MiB anew each time, so that the
    system clears every page of them: a fifth of the time of a training step. Steps of the demo were 1.4 to 1.5 times as
    fast, with 1.2 times the memory.

    Args:
        keep: whether to do so; otherwise nothing changes.
    """
    library = _glibc() if keep else None
    if library is None:
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:  # to what glibc arrives at by itself
        library.mallopt(_MMAP_MAX, _MAPPINGS)
        library.mallopt(_MMAP_THRESHOLD, 2**25)
        library.mallopt(_TRIM_THRESHOLD, 2**26)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it has glibc's `mallopt` and `malloc_trim`."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of tensors on a CUDA device; for other devices, the peak resident set of the process. In bytes."""
    if device.type != "cuda":
        return peak_rss_bytes()
    import torch

    return torch.cuda.max_memory_allocated(device)
