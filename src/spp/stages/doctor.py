"""Versions, devices and back-ends of this installation. What is broken is reported, never raised."""

from __future__ import annotations

import os
import platform
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table
from rich.text import Text

from spp import __version__

Value = TypeVar("Value")

_REQUIRED = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
# Package -> extra of spp that brings it.
_OPTIONAL = {"trl": "trl", "lm_eval": "eval", "deepspeed": "deepspeed", "bitsandbytes": "quant"}


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """The result of `diagnose`.

    Attributes:
        versions: package -> version; None where it is not installed.
        environment: see `environment`.
        backends: back-end of the SPP operator -> how it runs here, or why it does not.
        peft_knows_spp: whether PEFT lists SPP among its adapter types.
        problems: what is broken, one sentence each.
    """

    versions: dict[str, str | None]
    environment: dict[str, Any]
    backends: dict[str, str]
    peft_knows_spp: bool
    problems: list[str]


def diagnose() -> DoctorReport:
    """Look at this installation: import what is installed, and list what fails."""
    found = versions()
    problems = [f"{name} is missing; pip install {name}" for name in _REQUIRED if found[name] is None]
    for name in (*_REQUIRED, *_OPTIONAL):
        if found[name] is not None:
            _attempt(lambda name=name: import_module(name), f"{name} {found[name]} cannot be imported", problems)
    return DoctorReport(
        versions=found,
        environment=environment(),
        backends=_attempt(_backends, "the SPP operator does not load", problems) or {},
        peft_knows_spp=bool(_attempt(_peft_knows_spp, "PEFT does not take the adapter type SPP", problems)),
        problems=problems,
    )


def _attempt(action: Callable[[], Value], failure: str, problems: list[str]) -> Value | None:
    """Do something that a broken package can fail in any way; note what it says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return action()
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        problems.append(f"{failure}: {type(error).__name__}: {first_line}".removesuffix(": "))
        return None


def _backends() -> dict[str, str]:
    import torch

    ops, native = import_module("spp.ops"), import_module("spp.ops.native")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_device = {"native": "cpu", "triton": device}
    found: dict[str, str] = {}
    for name in ops.BACKENDS:
        weight = torch.empty(1, 1, device=on_device.get(name, "cpu"))
        reason = ops.why_not(name, weight)
        found[name] = f"not available: {reason}" if reason else "available"
    if native.instructions():
        threads = "torch's threads" if native.multithreaded() else "one thread: torch's OpenMP was not found"
        found["native"] = f"available ({native.instructions()}, {threads})"
    else:
        found["native"] += "; install a C++ compiler and then spp again"
    return found


def _peft_knows_spp() -> bool:
    import_module("spp.tuner")
    return "SPP" in import_module("peft").PeftType.__members__


def versions() -> dict[str, str | None]:
    """Versions of spp, Python and every package that matters, without importing any; None where one is missing."""
    return {
        "spp": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except Exception:  # missing, or with metadata that cannot be read
        return None


def environment() -> dict[str, Any]:
    """The hardware, in words and numbers that may be shared: no user, host or folder names.

    Returns:
        system, cpu (model name), cpu_instructions (widest set that torch uses), cores (that this process may use),
        threads (torch's), memory_bytes, and accelerators: a list of name and memory_bytes (None for shared memory).
        A value is None where it cannot be found out.
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
    return _attempt(measure, "", [])


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


def doctor_table(report: DoctorReport) -> Table:
    """Versions, hardware, back-ends and problems, one fact a row."""
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    sections: list[list[tuple[str, str]]] = [
        [(name, version or _absent(name)) for name, version in report.versions.items()],
        _hardware_rows(report.environment),
        [
            *((f"back-end {name}", state) for name, state in report.backends.items()),
            ("PEFT adapter type SPP", "registered" if report.peft_knows_spp else "NOT registered"),
        ],
        [("PROBLEM", problem) for problem in report.problems] or [("problems", "none")],
    ]
    for rows in sections:
        if table.row_count:
            table.add_row()
        for label, value in rows:
            table.add_row(Text(label), Text(value))
    return table


def _absent(name: str) -> str:
    remedy = f'"spp[{_OPTIONAL[name]}]"' if name in _OPTIONAL else name
    return f"not installed (pip install {remedy})"


def _hardware_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (name.replace("_", " "), "unknown" if facts[name] is None else str(facts[name]))
        for name in ("system", "cpu", "cpu_instructions", "cores", "threads")
    ]
    rows.append(("memory", _gibibytes(facts["memory_bytes"])))
    accelerators = [
        ("accelerator", device["name"] + (f", {_gibibytes(device['memory_bytes'])}" if device["memory_bytes"] else ""))
        for device in facts["accelerators"]
    ]
    return rows + (accelerators or [("accelerator", "none")])


def _gibibytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
