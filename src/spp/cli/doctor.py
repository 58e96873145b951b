"""`spp doctor`: versions, devices and back-ends of this installation. Problems are reported, never raised."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any, TypeVar

from rich.table import Table
from rich.text import Text

from spp.runtime.environment import OPTIONAL, REQUIRED, environment, versions

Value = TypeVar("Value")

_SIZE, _REPEATS = 1024, 5


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """The result of `diagnose`.

    Attributes:
        versions: package -> version; None where it is not installed.
        environment: see `environment`.
        backends: back-end of the SPP operator -> how it runs here, or why it does not.
        bfloat16: whether training on this CPU computes in bfloat16 by itself, and how fast that is beside float32.
        peft_knows_spp: whether PEFT lists SPP among its adapter types.
        problems: one sentence for each problem.
    """

    versions: dict[str, str | None]
    environment: dict[str, Any]
    backends: dict[str, str]
    bfloat16: str
    peft_knows_spp: bool
    problems: list[str]


def diagnose() -> DoctorReport:
    """Examine this installation: import the installed packages, and list what fails."""
    found = versions()
    problems = [f"{name} is missing; pip install {name}" for name in REQUIRED if found[name] is None]
    for name in (*REQUIRED, *OPTIONAL):
        if found[name] is not None:
            _attempt(lambda name=name: import_module(name), f"{name} {found[name]} cannot be imported", problems)
    return DoctorReport(
        versions=found,
        environment=environment(),
        backends=_attempt(_backends, "the SPP operator does not load", problems) or {},
        bfloat16=_attempt(_bfloat16, "products in bfloat16 fail", problems) or "unknown",
        peft_knows_spp=bool(_attempt(_peft_knows_spp, "PEFT does not take the adapter type SPP", problems)),
        problems=problems,
    )


def _attempt(action: Callable[[], Value], failure: str, problems: list[str]) -> Value | None:
    """The result of `action`; if it fails, in whatever way, None, and the error is added to `problems`."""
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
        found["native"] += "; reinstall spp where there is a C++ compiler"
    return found


def _bfloat16() -> str:
    """Measured with a product of the size of a layer's; the fastest of some, as other processes may interfere."""
    import torch

    from spp.runtime.devices import cpu_multiplies_bfloat16

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(_SIZE, _SIZE, dtype=dtype)
        began = [time.perf_counter()]
        for _ in range(_REPEATS):
            torch.mm(x, x)
            began.append(time.perf_counter())
        return min(after - before for before, after in pairwise(began))

    ratio = seconds(torch.float32) / seconds(torch.bfloat16)
    chosen = "bfloat16" if cpu_multiplies_bfloat16() else "float32"
    return f"products {ratio:.1f} x as fast as in float32; bfloat16 models train in {chosen} here, unless asked"


def _peft_knows_spp() -> bool:
    import_module("spp.adapters.tuner")
    return "SPP" in import_module("peft").PeftType.__members__


def doctor_table(report: DoctorReport) -> Table:
    """Versions, hardware, back-ends and problems, one per row."""
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    sections: list[list[tuple[str, str]]] = [
        [(name, version or _absent(name)) for name, version in report.versions.items()],
        _hardware_rows(report.environment),
        [
            *((f"back-end {name}", state) for name, state in report.backends.items()),
            ("bfloat16", report.bfloat16),
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
    remedy = f'"spp-llm[{OPTIONAL[name]}]"' if name in OPTIONAL else name
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
