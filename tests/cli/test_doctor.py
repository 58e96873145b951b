"""Diagnosis: true values where all is well, and words instead of a crash where something is broken."""

from __future__ import annotations

import getpass
import importlib
import json
import platform
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console

from spp import __version__
from spp.cli import doctor
from spp.cli.doctor import diagnose, doctor_table
from spp.ops import BACKENDS, native
from spp.runtime.environment import environment, versions


def shown(report) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(doctor_table(report))
    return capture.get()


@pytest.fixture
def without(monkeypatch):
    """Make importing a package fail, and by default look as if it were not installed."""

    def break_(name: str, error: Exception | None = None, version: str | None = None) -> None:
        real_import, real_version = doctor.import_module, importlib.metadata.version

        def import_module(asked: str):
            if asked.split(".")[0] == name:
                raise error or ModuleNotFoundError(f"No module named {name!r}")
            return real_import(asked)

        def find_version(asked: str) -> str:
            if asked != name:
                return real_version(asked)
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        for module in (doctor, sys.modules["spp.runtime.environment"]):
            monkeypatch.setattr(module, "import_module", import_module)
        monkeypatch.setattr(importlib.metadata, "version", find_version)

    return break_


def test_versions_are_those_of_what_is_imported():
    found = versions()
    assert (found["spp"], found["python"]) == (__version__, platform.python_version())
    assert found["torch"] == torch.__version__
    assert {"transformers", "peft", "trl", "accelerate", "datasets", "safetensors"} < set(found)
    assert {"lm_eval", "deepspeed", "bitsandbytes"} < set(found)


def test_the_environment_is_plausible_and_says_nothing_of_the_user():
    found = environment()
    assert found["system"].startswith(platform.system())
    assert found["cpu"] and 1 <= found["cores"] <= 4096
    assert found["threads"] == torch.get_num_threads()
    assert 2**28 < found["memory_bytes"] < 2**50
    assert len(found["accelerators"]) == (torch.cuda.device_count() or int(torch.backends.mps.is_available()))
    text = json.dumps(found)
    assert str(Path.home()) + "/" not in text and str(Path.cwd()) not in text
    words = text.replace('"', " ").split()
    assert socket.gethostname() not in words and getpass.getuser() not in words


def test_a_sound_installation():
    report = diagnose()
    assert report.problems == [] and report.peft_knows_spp
    assert list(report.backends) == list(BACKENDS) and report.backends["reference"] == "available"
    assert report.backends["native"].startswith("available (") == bool(native.instructions())
    text = shown(report)
    assert "problems" in text and "none" in text and "registered" in text and "NOT registered" not in text
    json.dumps(asdict(report))


def test_an_optional_package_that_is_missing_is_no_problem(without):
    without("deepspeed")
    report = diagnose()
    assert report.versions["deepspeed"] is None and report.problems == []
    assert 'not installed (pip install "spp-llm[deepspeed]")' in shown(report)


def test_a_required_package_that_is_missing_is_one(without):
    without("accelerate")
    report = diagnose()
    assert report.problems == ["accelerate is missing; pip install accelerate"]
    assert "PROBLEM" in shown(report)


@pytest.mark.parametrize("error", [ImportError("libcudart.so.12: no such file\nmore"), OSError("bad ELF"), KeyError()])
def test_an_optional_package_that_is_broken_is_named(without, error):
    without("bitsandbytes", error, "0.45.0")
    [problem] = diagnose().problems
    assert problem.startswith("bitsandbytes 0.45.0 cannot be imported: " + type(error).__name__)
    assert "more" not in problem


def test_torch_that_is_broken_leaves_a_report(without):
    without("torch", OSError("libtorch.so: wrong ELF class"), "2.13.0")
    report = diagnose()
    assert any(
        problem.startswith("torch 2.13.0 cannot be imported: OSError: libtorch.so") for problem in report.problems
    )
    assert report.environment["threads"] is None and report.environment["memory_bytes"] > 0
    assert "unknown" in shown(report)


def test_an_operator_and_a_registration_that_fail_are_named(without):
    without("spp", ImportError("PeftType of this PEFT cannot be extended by SPP"))
    report = diagnose()
    assert (report.backends, report.peft_knows_spp) == ({}, False)
    assert [problem.split(":")[0] for problem in report.problems] == [
        "the SPP operator does not load",
        "PEFT does not take the adapter type SPP",
    ]
    assert "NOT registered" in shown(report)


def test_looking_at_versions_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from spp.cli.doctor import versions\n"
        "versions()\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_accelerators_come_with_their_memory(monkeypatch):
    device = type("Device", (), {"name": "NVIDIA H100", "total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    assert environment()["accelerators"][1] == {"name": "NVIDIA H100", "memory_bytes": 80 * 2**30}
    found = {"versions": {}, "backends": {}, "bfloat16": "", "peft_knows_spp": True, "problems": []}
    report = doctor.DoctorReport(environment=environment(), **found)
    assert "NVIDIA H100, 80.0 GiB" in shown(report)


def test_without_a_compiler_it_is_said_what_to_do(monkeypatch):
    monkeypatch.setattr(native, "_LIBRARY", None)
    monkeypatch.setattr(native, "why_not_loaded", "it was not built when spp was installed")
    state = diagnose().backends["native"]
    assert state.startswith("not available: it was not built") and "C++ compiler" in state


@pytest.mark.parametrize(("instructions", "dtype"), [({"avx512_bf16": True}, "bfloat16"), ({}, "float32")])
def test_the_speed_of_bfloat16_is_measured(monkeypatch, instructions, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    report = diagnose()
    ratio, _, rest = report.bfloat16.removeprefix("products ").partition(" x as fast as in float32; ")
    assert float(ratio) > 0 and rest == f"bfloat16 models train in {dtype} here, unless asked"
    assert report.bfloat16 in shown(report)
