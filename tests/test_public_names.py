"""What `import spp` provides: every command as a function of its name, all names with a star, nothing of torch."""

from __future__ import annotations

import builtins
import subprocess
import sys
from importlib import import_module

import pytest

import spp
from spp.cli.commands import COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_function_of_its_name(command):
    module, work = COMMANDS[command].work.split(":")
    assert getattr(spp, command.replace("-", "_")) is getattr(import_module(module), work)
    options = COMMANDS[command].options.__name__
    assert options == "Options" or getattr(spp, options) is COMMANDS[command].options


def test_a_star_brings_every_name_but_replaces_none_of_pythons():
    names: dict[str, object] = {}
    exec("from spp import *", names)
    assert set(spp.__all__) == {*spp._HOMES, "__version__"} - {"eval"} and set(spp.__all__) <= set(names)
    assert not set(spp.__all__) & set(vars(builtins)) and set(spp._HOMES) <= set(dir(spp))


def test_importing_the_package_imports_no_torch():
    code = "import sys, spp; assert not {'torch', 'transformers', 'peft', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
