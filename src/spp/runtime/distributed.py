"""One process, or several that torchrun started; code that uses this works with any number of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Context manager: joins the processes that torchrun started in a process group; does nothing for a single one.

    Args:
        device: device of the tensors that the processes will exchange.
    """
    if launched_world_size() == 1 or dist.is_initialized():
        yield
        return
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def launched_world_size() -> int:
    """How many processes torchrun has started, on all machines, whether or not they have joined a group yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """The number of this process among those that torchrun has started, from 0; they need not be joined yet."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int | None:
    """The number of this process among those that torchrun started on this machine; None if it is the only one."""
    return int(os.environ["LOCAL_RANK"]) if launched_world_size() > 1 and "LOCAL_RANK" in os.environ else None


def world_size() -> int:
    """The number of processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process in the group, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait until every process has called this."""
    if dist.is_initialized():
        dist.barrier()


def device() -> torch.device:
    """The device of tensors that the processes exchange."""
    return torch.device("cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu")


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum the tensors of all processes, in place, and return `tensor`."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor, source: int) -> None:
    """Set `tensor`, a view with any strides, to its values in process `source`."""
    if dist.is_initialized():
        buffer = tensor.contiguous()
        dist.broadcast(buffer, source)
        tensor.copy_(buffer)


def all_gather(value: Any) -> list[Any]:
    """The values of all processes, in the order of their numbers."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
