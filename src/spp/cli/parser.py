"""Flags and their help, made from the option models."""

from __future__ import annotations

import argparse
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic.fields import FieldInfo

from spp._version import __version__
from spp.cli.commands import COMMANDS, Command
from spp.options import RENAMED, Options

_DOCTOR_HELP = "Versions, devices and active back-ends of this installation."


class _Parser(argparse.ArgumentParser):
    """Accepts only whole names of flags; the error for an old flag names the new one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        for old, new in RENAMED.items():
            message = re.sub(rf"--(no-)?{old}(?![\w-])", rf"\g<0> (it is called --\g<1>{new} now)", message)
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, made from `COMMANDS` and the option models."""
    parser = _Parser(
        prog="spp",
        description="Fine-tune pruned LLMs without losing their sparsity: prune, train, merge, verify, evaluate.",
        epilog="Start with `spp run`: without arguments, it runs all steps on a small bundled model.",
    )
    parser.add_argument("--version", action="version", version=f"spp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        _add_command(commands, name, command)
    return parser


def _add_command(commands: Any, name: str, command: Command) -> None:
    summary = _DOCTOR_HELP if command.options is Options else _summary(command.options)
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example: {command.example}",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--json", action="store_true", default=False, help="print the result as one JSON object")
    if command.dry_run:
        parser.add_argument("--dry-run", action="store_true", help="only print the predicted peak memory, part by part")
    if command.takes_recipe:
        flags = ["recipe"] if name == "run" else ["--recipe"]
        extra: dict[str, Any] = {"nargs": "?"} if name == "run" else {}
        help_text = "YAML file with options, or a shipped recipe (demo, paper); flags override it"
        parser.add_argument(*flags, metavar="RECIPE", help=help_text, **extra)
    _add_options(parser, command)


def _add_options(parser: argparse.ArgumentParser, command: Command) -> None:
    """One flag per field, in a group for each option set that the command shares with others."""
    groups: dict[type, Any] = {command.options: parser}
    for name, field in command.options.model_fields.items():
        owner = next(
            base for base in reversed(command.options.__mro__) if name in vars(base).get("__annotations__", {})
        )
        positional = name in command.positional
        if not positional and owner not in groups:
            groups[owner] = parser.add_argument_group(_summary(owner).rstrip("."))
        _add_option(parser if positional else groups[owner], name, field, positional=positional)


def _summary(options: type[Options]) -> str:
    """The first line of a docstring without the command it may begin with: ``spp x Y`: words` -> `Words`."""
    text = (options.__doc__ or "").strip().splitlines()[0]
    text = text.split("`: ", 1)[-1]
    return text[:1].upper() + text[1:]


def _add_option(group: Any, name: str, field: FieldInfo, *, positional: bool) -> None:
    help_text = (field.description or "").replace("%", "%%")
    if not (field.is_required() or field.default is None or field.default is False or field.default == ()):
        help_text += f" (default: {field.default})".replace("%", "%%")
    kinds = _kinds(field.annotation)
    several: dict[str, Any] = {}
    if typing.get_origin(kinds[0]) is tuple:
        several["nargs"] = "*" if positional and field.default == () else "+"
    if positional:
        if not several and not field.is_required():
            several["nargs"] = "?"
        metavar = name.upper().removesuffix("S") if several else name.upper()
        group.add_argument(name, metavar=metavar, help=help_text, **several)
        return
    flag = "--" + name.replace("_", "-")
    if kinds == (bool,):
        # One that depends on the data unless it is given can be turned off as well as on.
        action = argparse.BooleanOptionalAction if field.default is None else "store_true"
        group.add_argument(flag, action=action, help=help_text)
    else:
        group.add_argument(
            flag, metavar=_metavar(field, kinds[0]), help=help_text, required=field.is_required(), **several
        )


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation but None: `int | None` -> (int,), a Literal -> itself."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return tuple(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return (annotation,)


def _metavar(field: FieldInfo, kind: Any) -> str:
    """The placeholder of a value in the help: the field's own, or one from the type."""
    if isinstance(field.json_schema_extra, dict) and "metavar" in field.json_schema_extra:
        return str(field.json_schema_extra["metavar"])
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")
