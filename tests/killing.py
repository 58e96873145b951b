"""Run a program that is killed at a chosen call of a function, as `kill -9` does it."""

from __future__ import annotations

import signal
import subprocess
import sys

_COUNTED = """
import os, signal
import spp.{module} as module

real, calls = module.{owner}.{function}, 0
def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
module.{owner}.{function} = counted
"""


def run_killed(program: str, module: str, owner: str, function: str, call: int) -> None:
    """Run `program`, and see that it is killed at that call of spp.`module`.`owner`.`function`."""
    script = _COUNTED.format(module=module, owner=owner, function=function, call=call) + program
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
