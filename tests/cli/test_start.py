"""No traceback: an interrupt while modules are imported, and errors that nothing foresaw."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from spp.cli import entry_point
from spp.cli.entry_point import main
from spp.cli.interrupts import ends_at_once


@pytest.mark.parametrize("stage", ["import pydantic", "import torch"])
def test_an_interrupt_while_starting_up_ends_with_130_and_one_line(stage, tmp_path):
    """The module that is imported raises the signal itself, so that no time has to be guessed."""
    name = stage.split()[1]
    (tmp_path / f"{name}.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise AssertionError\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from spp.cli import main; sys.exit(main(['inspect', '.']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert done.stderr.splitlines() == ["error: interrupted while starting up; nothing was done"]


def test_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with ends_at_once():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    thread = threading.Thread(target=lambda: ends_at_once().__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


class PanicException(BaseException):
    """Named as the one that libraries in Rust raise."""


@pytest.mark.parametrize(
    "error", [TypeError("unhashable type: 'list'"), RecursionError("deep"), PanicException("range")]
)
def test_an_error_that_nothing_foresaw_is_one_line(error, monkeypatch, capsys):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(entry_point, "_execute", fail)
    assert main(["doctor"]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: {type(error).__name__}") and str(error) in message and message.count("\n") == 1
    monkeypatch.setenv("SPP_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["doctor"])


def test_an_error_of_the_system_names_the_file(monkeypatch, capsys):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "out/model.safetensors")

    monkeypatch.setattr(entry_point, "_execute", fail)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == (
        "error: out/model.safetensors: No space left on device; make room, and repeat the command\n"
    )
