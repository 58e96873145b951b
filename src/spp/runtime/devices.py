"""Which device to compute on, and in which dtype."""

from __future__ import annotations

import torch

from spp.errors import UsageError
from spp.runtime import distributed

_BFLOAT16_PRODUCTS = ("avx512_bf16", "amx_bf16")


def pick_device(device: str) -> torch.device:
    """The torch device for `auto` (an accelerator if there is one, else the CPU) or for a name.

    Under torchrun, each process on a machine gets an accelerator of its own.

    Raises:
        UsageError: the device is unknown or not on this machine, or several processes would share it.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        picked = (accelerator or torch.device("cpu")) if device == "auto" else torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r} is unknown; use auto, cpu, cuda, cuda:1 or mps") from None
    if picked.type != "cpu" and (number := distributed.local_rank()) is not None:
        if picked.index is not None:
            raise UsageError(f"device {device!r} is one for several processes; pass --device {picked.type}")
        if number >= (count := torch.accelerator.device_count()):
            raise UsageError(f"{count} accelerators are not enough for {number + 1} processes; start no more than that")
        picked = torch.device(picked.type, number)
    known = picked.type == "cpu" or (accelerator is not None and picked.type == accelerator.type)
    if not known or (picked.type != "cpu" and (picked.index or 0) >= torch.accelerator.device_count()):
        raise UsageError(f"device {device!r} is not on this machine; pass --device auto or cpu")
    return picked


def compute_dtype(asked: str, device: torch.device) -> str | torch.dtype:
    """The `dtype` argument for transformers: `asked`; for `auto` fp32 on a CPU, else the checkpoint's own.

    Every bf16 and fp16 weight is exact in fp32, and most CPUs multiply fp32 several times faster.
    """
    if asked != "auto":
        return getattr(torch, asked)
    return torch.float32 if device.type == "cpu" else "auto"


def training_dtype(asked: str, device: torch.device, stored: torch.dtype | None) -> str | torch.dtype:
    """As `compute_dtype`, but for `auto` a bf16 checkpoint trains in bf16 on a CPU, too, if that multiplies it.

    Args:
        asked: a dtype, or `auto`.
        device: where to train.
        stored: the checkpoint's dtype, as far as its configuration has it.
    """
    if asked == "auto" and device.type == "cpu" and stored == torch.bfloat16 and cpu_multiplies_bfloat16():
        return torch.bfloat16
    return compute_dtype(asked, device)


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products in bf16, which are about twice as fast as those in fp32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch lack it
    return any(capabilities.get(name) for name in _BFLOAT16_PRODUCTS)
