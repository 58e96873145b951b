"""Every option of every command reaches its consumer: changing it alone changes the result, or what is seen inside.

The modules `test_options_reach_*.py` have the rows: for each option a change, and where it shows. Here is what a row
is, and the test that no option of the parser is without one. A row runs its command on the tiny models of
`test_options_reach_stock.py` without the change and with it; rows share their runs. Without the change a command is
run twice, because a difference that is mere chance would pass for an effect.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_options_reach_stock import Outcome, stock_of

from spp.cli.parser import build_parser

Look = Callable[[Outcome], Any]
ANY: Any = ...
"""For `Row.after`: anything but what was seen without the change."""


@dataclass(frozen=True)
class Row:
    """How an option is shown to reach its consumer.

    Attributes:
        option: the parser's name of it.
        change: the words that change it; see `Stock.run`.
        look: where the change shows.
        given: words that the command has without the change and with it.
        after: what is seen with the change.
        same: what the change must not reach; it rules out that another consumer of the option makes the difference.
        codes: exit codes without the change and with it.
        for_people: without --json.
    """

    command: str
    option: str
    change: str
    look: Look
    given: str = ""
    after: Any = ANY
    same: Look | None = None
    codes: tuple[int, int] = (0, 0)
    for_people: bool = False

    def __str__(self) -> str:
        return f"{self.command} {self.change}" + (f" ({self.given})" if self.given else "")


def check(row: Row, request: pytest.FixtureRequest) -> None:
    """Run a row's command without its change and with it, and look."""
    stock, form = stock_of(request), "" if row.for_people else "--json"
    usual, again = (stock.outcome(row.command, f"{row.given} {form}", time) for time in ("", "again"))
    changed = stock.outcome(row.command, f"{row.given} {row.change} {form}")
    assert (usual.code, changed.code) == row.codes, usual.stderr + changed.stderr
    before, after = row.look(usual), row.look(changed)
    assert row.look(again) == before, "it differs from run to run, so a difference says nothing"
    assert after != before, "the change has no effect"
    assert row.after is ANY or after == row.after
    assert row.same is None or row.same(changed) == row.same(usual)


def tensors(outcome: Outcome) -> str:
    """SHA-256 of all tensors in the output folder."""
    found = hashlib.sha256()
    paths = sorted(outcome.out.rglob("*.safetensors"))
    assert paths, outcome.stderr
    for name, tensor in (item for path in paths for item in sorted(load_file(path).items())):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def report(*keys: str) -> Look:
    """A value in what --json prints; None where the command has failed."""
    return lambda outcome: _inside(json.loads(outcome.stdout or "{}"), keys)


def setting(file: str, *keys: str) -> Look:
    """A value in a JSON file of the output folder."""
    return lambda outcome: _inside(json.loads((outcome.out / file).read_text()), keys)


def _inside(value: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        value = value.get(key)
    return value


def seen(name: str) -> Look:
    """What was noted inside the command."""
    return lambda outcome: outcome.seen.get(name)


def error(words: str) -> Look:
    """Whether the command fails with a message, of one line or several, that has these words."""
    return lambda outcome: words in outcome.stderr.partition("error: ")[2]


def written(outcome: Outcome) -> list[str]:
    """What was written, as the ends of the names that begin with `{out}`."""
    name = outcome.out.name
    beside = [path.name.removeprefix(name) for path in outcome.out.parent.glob(f"{name}[!0-9]*")]
    return sorted([*beside, ""] if outcome.out.exists() else beside)


def users_files(outcome: Outcome) -> list[str]:
    """The files in `{taken}` that are as they were."""
    return sorted(path.name for path in outcome.out.iterdir() if path.is_file() and path.read_bytes() == b"mine")


def json_row(command: str) -> Row:
    """Standard output becomes one JSON object."""
    return Row(command, "json", "--json", _prints_json, after=True, for_people=True)


def _prints_json(outcome: Outcome) -> bool:
    try:
        return isinstance(json.loads(outcome.stdout), dict)
    except ValueError:
        return False


def device_row(command: str) -> Row:
    """Nothing can be computed on torch's device without memory; the function that picks a device refuses it."""
    return Row(command, "device", "--device meta", error("'meta'"), after=True, codes=(0, 2))


def trust_rows(command: str) -> list[Row]:
    """A model with code of its own is refused without the flag, and its code is not downloaded."""
    name, flag = "trust_remote_code", "--trust-remote-code"
    from_hub = Row(command, name, flag, seen("downloads"), "model=someone/pruned", after={("someone/pruned", True)})
    own = f"own-{command}"
    return [Row(command, name, flag, error(own), f"model={own}", after=False, codes=(2, 0)), from_hub]


def overwrite_row(command: str) -> Row:
    """The output goes where a user has files."""
    return Row(command, "overwrite", "--overwrite", users_files, "to={taken}", after=[], codes=(2, 0))


def out_row(command: str) -> Row:
    """The output goes to another place."""
    return Row(command, "out", "to={out}-elsewhere", written, after=["-elsewhere"])


def test_every_option_of_every_command_has_a_row() -> None:
    [commands] = [action for action in build_parser()._actions if action.dest == "command"]
    options = {
        (name, action.dest)
        for name, parser in dict(commands.choices or {}).items()
        for action in parser._actions
        if action.dest != "help"
    }
    modules = [import_module(path.stem) for path in sorted(Path(__file__).parent.glob("test_options_reach_*.py"))]
    rows: list[Row] = [row for module in modules for row in getattr(module, "ROWS", [])]
    assert {(row.command, row.option) for row in rows} == options
