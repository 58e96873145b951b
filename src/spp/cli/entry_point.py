"""The command `spp`: parse the arguments, call the command's function, and print its report."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spp.cli.commands import COMMANDS, Command
from spp.cli.interrupts import INTERRUPTED, ends_at_once
from spp.cli.parser import build_parser
from spp.errors import SppError, brief, readable
from spp.options import Options
from spp.pipeline.options import RunOptions
from spp.pipeline.recipes import load_recipe
from spp.runtime.files import is_disk_full


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see `spp.cli.start.main`."""
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
        _complain(_of_the_system(error))
        return 1
    except KeyboardInterrupt:
        _complain("interrupted; finished work is kept, and the same command with the same output folder resumes it")
        return INTERRUPTED
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # also a panic of a library in Rust, which is no Exception
        if os.environ.get("SPP_TRACEBACK"):
            raise
        _complain(_unexpected(error))
        return 1
    return 0 if getattr(report, "verified", True) else 1


def _execute(command: Command, given: dict[str, Any], *, dry_run: bool) -> Any:
    recipe = given.pop("recipe", None)
    if command.options is RunOptions and recipe is None and "model" not in given:
        recipe = "demo"  # the embedded default: the bundled model and a few minutes of training
    if recipe:
        given = {**load_recipe(recipe, command.options, method=given.get("method")), **given}
    options = command.options.build(given)
    module, function = (command.dry_run if dry_run and command.dry_run else command.work).split(":")
    with ends_at_once():
        work = getattr(importlib.import_module(module), function)
    return work() if command.options is Options else work(options)


def _present(command: str, report: Any, as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":  # of several processes, only one prints
        return
    if as_json:
        value = report.plain() if hasattr(report, "plain") else asdict(report)
        sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
        return
    from rich.console import Console

    from spp.cli.printing import describe

    console = Console()
    for part in describe(command, report):
        console.print(part, soft_wrap=isinstance(part, str), markup=False, highlight=False)


def _quiet_libraries() -> None:
    """Silence the messages of other libraries; must run before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")


class _Messages(logging.Handler):
    """Writes the messages of the `spp` logger to the present standard error (a live progress bar redirects it)."""

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
    sys.stderr.write(f"error: {readable(message)}\n")


def _of_the_system(error: OSError) -> str:
    if error.filename is None or error.strerror is None:
        return brief(error)
    place = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    remedy = "; make room, and repeat the command" if is_disk_full(error) else ""
    return f"{place}: {error.strerror}{remedy}"


def _unexpected(error: BaseException) -> str:
    """An error that nothing else foresaw: what it is, where, and how to find out more."""
    steps = [step for step in traceback.extract_tb(error.__traceback__) if f"{os.sep}spp{os.sep}" in step.filename]
    where = f" in {Path(steps[-1].filename).name}, line {steps[-1].lineno}" if steps else ""
    return (
        f"{type(error).__name__}{where}: {brief(error)}. An input may be damaged in a way that spp does not know, or "
        "this is a bug of spp; with SPP_TRACEBACK=1 in the environment, the same command shows where it happened"
    )


if __name__ == "__main__":
    sys.exit(main())
