"""Versions and hardware of this installation, without anything private."""

from __future__ import annotations

import os
import platform
import subprocess
import warnings
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, TypeVar

from spp._version import __version__

Value = TypeVar("Value")
REQUIRED = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
# Package -> the extra of spp that installs it.
OPTIONAL = {"trl": "trl", "lm_eval": "eval", "deepspeed": "deepspeed", "bitsandbytes": "quant"}


def versions() -> dict[str, str | None]:
    """Versions of spp, Python and every relevant package, without importing them; None for a missing package."""
    return {
        "spp": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in (*REQUIRED, *OPTIONAL)},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except Exception:  # missing, or its metadata cannot be read
        return None


def environment() -> dict[str, Any]:
    """The hardware, without user, host or folder names.

    Returns:
        system, cpu (model name), cpu_instructions (widest set that torch uses), cores (that this process may use),
        threads (torch's), memory_bytes, and accelerators: a list of name and memory_bytes (None for shared memory).
        A value that cannot be determined is None.
    """
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _or_none(_cpu_model),
        "cpu_instructions": _or_none(lambda: import_module("torch").backends.cpu.get_cpu_capability()),
        "cores": _or_none(_cores),
        "threads": _or_none(lambda: import_module("torch").get_num_threads()),
        "memory_bytes": _or_none(lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    }
    return {**facts, "accelerators": _or_none(_accelerators) or []}


def _or_none(measure: Callable[[], Value]) -> Value | None:
    """The result of `measure`; None if it fails, in whatever way."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return measure()
    except Exception:
        return None


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_model() -> str | None:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or None


def _accelerators() -> list[dict[str, Any]]:
    import torch

    devices: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        devices += [{"name": device.name, "memory_bytes": device.total_memory} for device in found]
    if torch.backends.mps.is_available():
        devices.append({"name": "Apple GPU (mps)", "memory_bytes": None})
    return devices
