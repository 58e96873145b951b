"""`spp`: a table of commands. Flags and their help come from the option models, work from the stage functions."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from spp import __version__
from spp import options as opt
from spp.errors import SppError
from spp.recipes import load_recipe

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand: its options, which of them are positional, `module:function` of its work, and of its preview."""

    options: type[opt.Options]
    positional: tuple[str, ...] = ()
    stage: str
    example: str
    takes_recipe: bool = False
    dry_run: str | None = None


COMMANDS: dict[str, Command] = {
    "run": Command(
        options=opt.RunOptions,
        stage="spp.pipeline:run",
        example="spp run --model meta-llama/Llama-3.2-1B --pattern 2:4 --train alpaca.json --eval wiki.txt --out out",
        takes_recipe=True,
    ),
    "prune": Command(
        options=opt.PruneOptions,
        positional=("model", "out"),
        stage="spp.stages.prune:prune",
        example="spp prune ./llama ./llama-2of4 --pattern 2:4 --criterion wanda --calibration c4.jsonl",
        dry_run="spp.stages.pruning_prediction:predict_pruning",
    ),
    "train": Command(
        options=opt.TrainOptions,
        positional=("model", "out"),
        stage="spp.stages.train:train",
        example="spp train ./llama-2of4 ./adapter --data alpaca.json --epochs 3",
        takes_recipe=True,
        dry_run="spp.stages.prediction:predict_training",
    ),
    "cache-teacher": Command(
        options=opt.CacheTeacherOptions,
        positional=("model", "out"),
        stage="spp.stages.teacher_cache:cache_teacher",
        example="spp cache-teacher ./llama ./answers --data alpaca.json",
    ),
    "merge": Command(
        options=opt.MergeOptions,
        positional=("model", "adapter", "out"),
        stage="spp.stages.merge:merge",
        example="spp merge ./llama-2of4 ./adapter ./llama-2of4-tuned",
    ),
    "convert": Command(
        options=opt.ConvertOptions,
        positional=("adapter", "out"),
        stage="spp.stages.convert:convert",
        example="spp convert ./adapter ./adapter-hira --to hira",
    ),
    "verify": Command(
        options=opt.VerifyOptions,
        positional=("base", "other"),
        stage="spp.stages.verify:verify",
        example="spp verify ./llama-2of4 ./llama-2of4-tuned --pattern 2:4",
    ),
    "eval": Command(
        options=opt.EvalOptions,
        positional=("model", "others"),
        stage="spp.stages.evaluate:evaluate",
        example="spp eval ./llama-2of4-tuned --text wikitext2_test.txt --window 2048",
    ),
    "pack": Command(
        options=opt.PackOptions,
        positional=("model", "out"),
        stage="spp.stages.pack:pack",
        example="spp pack ./llama-2of4-tuned ./llama-2of4-packed",
    ),
    "unpack": Command(
        options=opt.UnpackOptions,
        positional=("model", "out"),
        stage="spp.stages.pack:unpack",
        example="spp unpack ./llama-2of4-packed ./llama-2of4-plain",
    ),
    "generate": Command(
        options=opt.GenerateOptions,
        positional=("model",),
        stage="spp.stages.generate:generate",
        example='spp generate ./llama-2of4-packed --prompt "Once upon a time"',
    ),
    "inspect": Command(
        options=opt.InspectOptions,
        positional=("model",),
        stage="spp.stages.inspection:inspect_model",
        example="spp inspect ./llama-2of4",
    ),
    "push": Command(
        options=opt.PushOptions,
        positional=("model", "repo"),
        stage="spp.stages.push:push_to_hub",
        example="spp push ./llama-2of4-tuned user/llama-2of4-tuned --private",
    ),
    "report": Command(
        options=opt.ReportOptions,
        positional=("runs",),
        stage="spp.stages.report:report",
        example="spp report runs/wanda runs/sparsegpt --out comparison.html",
    ),
    "doctor": Command(options=opt.Options, stage="spp.stages.doctor:diagnose", example="spp doctor --json"),
}

_DOCTOR_HELP = "Versions, devices and active back-ends of this installation."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 for success, 1 for failure, 2 for a wrong request."""
    arguments = vars(build_parser().parse_args(argv))
    name, as_json = arguments.pop("command"), arguments.pop("json")
    dry_run = arguments.pop("dry_run", False)
    _quiet_libraries()
    _show_messages()
    try:
        report = _execute(COMMANDS[name], arguments, dry_run=dry_run)
        _present(f"{name} --dry-run" if dry_run else name, report, as_json)
        sys.stdout.flush()
    except BrokenPipeError:  # `spp inspect MODEL | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SppError as error:
        _complain(str(error))
        return error.exit_code
    except OSError as error:  # a full disk, a folder without permission
        _complain(str(error))
        return 1
    except KeyboardInterrupt:
        _complain("interrupted; finished work is kept, and the same command with the same output folder resumes it")
        return _INTERRUPTED
    return 0 if getattr(report, "verified", True) else 1


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, made from `COMMANDS` and the option models."""
    parser = argparse.ArgumentParser(
        prog="spp",
        description="Fine-tune pruned LLMs without losing their sparsity: prune, train, merge, verify, evaluate.",
        epilog="Start with `spp run`: it needs no arguments, and shows the whole way on a small bundled model.",
    )
    parser.add_argument("--version", action="version", version=f"spp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        _add_command(commands, name, command)
    return parser


def _add_command(commands: Any, name: str, command: Command) -> None:
    summary = _DOCTOR_HELP if command.options is opt.Options else _summary(command.options)
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example: {command.example}",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--json", action="store_true", default=False, help="print the result as one JSON object")
    if command.dry_run:
        parser.add_argument(
            "--dry-run", action="store_true", help="print the memory that this would take, part by part, and stop"
        )
    if command.takes_recipe:
        flags = ["recipe"] if name == "run" else ["--recipe"]
        extra: dict[str, Any] = {"nargs": "?"} if name == "run" else {}
        help_text = "YAML file with options, or a shipped recipe (demo, paper); flags override it"
        parser.add_argument(*flags, metavar="RECIPE", help=help_text, **extra)
    groups: dict[type, Any] = {}
    for field_name, field in command.options.model_fields.items():
        owner = next(
            base for base in reversed(command.options.__mro__) if field_name in vars(base).get("__annotations__", {})
        )
        if field_name in command.positional:
            group = parser
        else:
            group = groups.setdefault(owner, parser) if owner is command.options else groups.get(owner)
            if group is None:
                group = groups[owner] = parser.add_argument_group(_summary(owner).rstrip("."))
        _add_option(group, field_name, field, positional=field_name in command.positional)


def _summary(options: type[opt.Options]) -> str:
    """The first line of a docstring without the command it may begin with: ``spp x Y`: words` -> `Words`."""
    text = (options.__doc__ or "").strip().splitlines()[0]
    text = text.split("`: ", 1)[-1]
    return text[:1].upper() + text[1:]


def _add_option(group: Any, name: str, field: Any, *, positional: bool) -> None:
    help_text = field.description.replace("%", "%%")
    if not (field.is_required() or field.default is None or field.default is False or field.default == ()):
        help_text += f" (default: {field.default})".replace("%", "%%")
    kinds = _kinds(field.annotation)
    several: dict[str, Any] = {}
    if typing.get_origin(kinds[0]) is tuple:
        several["nargs"] = "*" if positional and field.default == () else "+"
    if positional:
        metavar = name.upper().removesuffix("S") if several else name.upper()
        group.add_argument(name, metavar=metavar, help=help_text, **several)
        return
    flag = "--" + name.replace("_", "-")
    if kinds == (bool,):
        # One that depends on the data unless it is given can be turned off as well as on.
        action = argparse.BooleanOptionalAction if field.default is None else "store_true"
        group.add_argument(flag, action=action, help=help_text)
    else:
        group.add_argument(flag, metavar=_metavar(name, kinds), help=help_text, required=field.is_required(), **several)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation but None: `int | None` -> (int,), a Literal -> itself."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return tuple(kind for kind in typing.get_args(annotation) if kind is not type(None))
    return (annotation,)


def _metavar(name: str, kinds: tuple[Any, ...]) -> str:
    if typing.get_origin(kinds[0]) is Literal:
        return "|".join(typing.get_args(kinds[0]))
    if kinds[0] in (int, float):
        return "N" if kinds[0] is int else "X"
    return {
        "out": "PATH",
        "adapter": "DIR",
        "pattern": "P",
        "device": "DEVICE",
        "model": "MODEL",
        "base": "MODEL",
        "teacher": "MODEL",
        "prompt": "TEXT",
        "target_modules": "NAMES",
        "report_to": "NAMES",
        "tasks": "NAMES",
        "task_folder": "DIR",
        "reconstruct": "PARTS",
    }.get(name, "FILE")


def _execute(command: Command, given: dict[str, Any], *, dry_run: bool) -> Any:
    recipe = given.pop("recipe", None)
    if command.options is opt.RunOptions and recipe is None and "model" not in given:
        recipe = "demo"  # the embedded default: the bundled model and a few minutes of training
    values = {**load_recipe(recipe, command.options), **given} if recipe else given
    options = command.options.build(values)
    module, function = (command.dry_run if dry_run and command.dry_run else command.stage).split(":")
    stage = getattr(importlib.import_module(module), function)
    return stage() if command.options is opt.Options else stage(options)


def _present(command: str, report: Any, as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":  # of several processes, one speaks
        return
    if as_json:
        value = getattr(report, "results", None) or asdict(report)
        sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
        return
    from rich.console import Console

    from spp.presentation import describe

    console = Console()
    for part in describe(command, report):
        console.print(part, soft_wrap=isinstance(part, str), markup=False, highlight=False)


def _quiet_libraries() -> None:
    """Keep other people's chatter off the terminal; must run before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")


class _Messages(logging.Handler):
    """Notes and warnings of the `spp` logger, on whatever standard error is now (a live bar redirects it)."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        sys.stderr.write(f"{prefix}{record.getMessage()}\n")


def _show_messages() -> None:
    logger = logging.getLogger("spp")
    if not logger.handlers:
        logger.addHandler(_Messages())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _complain(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")


if __name__ == "__main__":
    sys.exit(main())
