"""Flags and their help, made from the option models."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic.fields import FieldInfo

from spp._version import __version__
from spp.cli.commands import COMMANDS, Command
from spp.cli.other_flags import OtherFlags
from spp.errors import readable
from spp.options import RENAMED, Options

_DOCTOR_HELP = "Versions, devices and active back-ends of this installation."


class _Parser(argparse.ArgumentParser):
    """Accepts only whole names of flags, ours or those of other tools; an error names what was meant, and the help."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:  # pyright: ignore
        """Parse; a command's own parser, which has more than one word in its name, refuses what it does not know."""
        words = list(sys.argv[1:] if args is None else args)
        if " " not in self.prog:
            return super().parse_known_args(words, namespace)
        flags = [flag for action in self._actions for flag in action.option_strings]
        positional = [action.dest for action in self._actions if not action.option_strings]
        others = OtherFlags(flags, positional, self.error)
        parsed, unknown = super().parse_known_args(others.ours(words), namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{others.suggestions(unknown)}")
        if others.notes:
            sys.stderr.write(f"note: {'; '.join(others.notes)}\n")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        for old, new in RENAMED.items():
            message = re.sub(rf"--(no-)?{old}(?![\w-])", rf"\g<0> (it is called --\g<1>{new} now)", message)
        if found := re.match(r"argument COMMAND: invalid choice: '(.*?)' ", message):
            close = difflib.get_close_matches(found[1], COMMANDS, n=1)
            message = f"there is no command {found[1]!r}" + (f"; did you mean spp {close[0]}?" if close else "")
        if " " in self.prog:
            positional = [action.dest.upper() for action in self._actions if not action.option_strings]
            usage, listed = " ".join([self.prog, *positional, "[OPTION ...]"]), "its options"
        else:
            usage, listed = f"{self.prog} COMMAND ...", "the commands"
        self.exit(2, f"usage: {usage}\nerror: {readable(message)}\n`{self.prog} --help` lists {listed}\n")


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
    fields = command.options.model_fields
    for name in dict.fromkeys((*command.positional, *fields)):
        owner = next(
            base for base in reversed(command.options.__mro__) if name in vars(base).get("__annotations__", {})
        )
        positional = name in command.positional
        if not positional and owner not in groups:
            groups[owner] = parser.add_argument_group(_summary(owner).rstrip("."))
        _add_option(parser if positional else groups[owner], name, fields[name], positional=positional)


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
