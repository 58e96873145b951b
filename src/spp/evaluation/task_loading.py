"""Load the tasks that `spp eval --tasks` names: from files, or by lm-eval from the hub."""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from spp.errors import UsageError, brief, raise_problems
from spp.evaluation.options import EvalOptions
from spp.evaluation.task_files import PAPER_TASKS, TaskFile, read_task_files
from spp.runtime.files import reading, user_path

logger = logging.getLogger("spp")

PAPER = "paper"
"""Name of the group of the SPP paper's seven tasks."""

HARNESS = "paper-harness"
"""Name of the same group, scored by the rules of the harness that the paper used."""

_SUFFIX = ".jsonl"
_DEFINITIONS = (".yaml", ".yml")
_FILES = "files"  # a group, because only members of a group may combine lm-eval's definition with other data


@dataclass(frozen=True)
class TaskSet:
    """Tasks ready to be scored.

    Attributes:
        loaded: lm-eval's tasks and groups, in the order of the request.
        files: the tasks that come from files, by name.
        missing: the paper's tasks that have no file.
        form: `paper` or `paper-harness` if that was asked for.
    """

    loaded: list[Any]
    files: dict[str, TaskFile]
    missing: list[str]
    form: str | None = None


@dataclass
class _Request:
    """The tasks that `--tasks` names, sorted by source."""

    files: dict[str, Path] = field(default_factory=dict)
    definitions: list[Path] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add_file(self, name: str, path: Path) -> None:
        """Add a task that is read from a file."""
        if (known := self.files.setdefault(name, path)) != path:
            self.problems.append(f"task {name!r} is in two files, {known} and {path}; rename one, or leave it out")


def load_tasks(options: EvalOptions) -> TaskSet:
    """Load the tasks that `--tasks` names.

    Raises:
        UsageError: lm-eval is not installed, or names, files or data sets are wrong; it lists all of one kind.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError('tasks need lm-eval: pip install "spp-llm[eval]"')
    request = _request(options)
    files = {file.name: file for file in read_task_files(request.files)}
    _require_examples(files.values(), options.num_fewshot or 0)
    with quiet():
        loaded = [*_from_files(files), *map(_defined, request.definitions), *_from_hub(request.names)]
    form = next((name for name in (HARNESS, PAPER) if name in options.task_names), None)
    return TaskSet(loaded, files, request.missing, form)


def _request(options: EvalOptions) -> _Request:
    request = _Request()
    folder = options.task_folder
    if folder is not None and not folder.is_dir():
        raise UsageError(f"task-folder {folder}: no such folder")
    if not options.task_names:
        raise UsageError(f"tasks is empty; name some, separated by commas: {', '.join(PAPER_TASKS)}, or {PAPER}")
    if HARNESS in options.task_names and len(options.task_names) > 1:
        raise UsageError(f"{HARNESS} has rules of its own for all tasks; score it by itself, without other tasks")
    for name in dict.fromkeys(options.task_names):
        path = user_path(name)
        if path.suffix in _DEFINITIONS:
            request.definitions.append(path)
            if not options.trust_remote_code:
                request.problems.append(
                    f"{path}: lm-eval fills in a definition's templates without a sandbox, so that it may run code; "
                    "pass --trust-remote-code if you trust it"
                )
        elif path.suffix == _SUFFIX:
            request.add_file(path.stem, path)
        elif path.is_dir():
            _add_folder(request, path)
        elif folder is not None:
            _add_of_folder(request, name, folder)
        else:
            request.names += PAPER_TASKS if name in (PAPER, HARNESS) else [name]
    both = [name for name in request.names if name in request.files]
    request.problems += [f"task {name!r} is named, and {request.files[name]} is one too; keep one" for name in both]
    raise_problems(request.problems)
    request.names = list(dict.fromkeys(request.names))
    return request


def _add_folder(request: _Request, folder: Path) -> None:
    paths = sorted(folder.glob(f"*{_SUFFIX}"))
    if not paths:
        request.problems.append(f"tasks {str(folder)!r}: no {_SUFFIX} file is in that folder")
    for path in paths:
        request.add_file(path.stem, path)


def _add_of_folder(request: _Request, name: str, folder: Path) -> None:
    """Add the task `name` from its file in a folder; for the paper's, all of its tasks that have one."""
    wanted = list(PAPER_TASKS) if name in (PAPER, HARNESS) else [name]
    there = [task for task in wanted if (folder / f"{task}{_SUFFIX}").is_file()]
    for task in there:
        request.add_file(task, folder / f"{task}{_SUFFIX}")
    if not there:
        files = ", ".join(path.name for path in sorted(folder.glob(f"*{_SUFFIX}"))) or f"no {_SUFFIX} file"
        request.problems.append(f"task {name!r}: {folder} has no file for it; it has {files}")
    elif missing := [task for task in wanted if task not in there]:
        request.missing = missing
        logger.warning(
            "%s of the paper's %d tasks have no file in %s and are left out: %s",
            len(missing), len(PAPER_TASKS), folder, ", ".join(missing),
        )  # fmt: skip


def _require_examples(files: Iterable[TaskFile], examples: int) -> None:
    raise_problems(
        [
            f"{file.path} has {len(file.rows)} items, too few for {examples} examples in front of another; "
            "pass a lower --num-fewshot"
            for file in files
            if len(file.rows) <= examples
        ]
    )


def _from_files(files: Mapping[str, TaskFile]) -> list[Any]:
    configurable_task: Any = import_module("lm_eval.api.task").ConfigurableTask
    own = [file for file in files.values() if file.hub_form]
    manager = _manager() if own else None
    tasks: list[Any] = []
    problems: list[str] = []
    for file in files.values():
        if file.hub_form:
            task = _with_own_definition(manager, file)
            problems += _unreadable(task, file)
        else:
            task = configurable_task(config=file.config())
        tasks.append(task)
    raise_problems(problems)
    return tasks


def _defined(path: Path) -> Any:
    """A task that a user's file defines in lm-eval's words, without Python functions of its own."""
    configurable_task: Any = import_module("lm_eval.api.task").ConfigurableTask
    with reading(path, "lm-eval's definition of a task", "write it in YAML, without !function"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise UsageError(f"{path}: expected lm-eval's definition of a task, `key: value` lines")
    try:
        return configurable_task(config={"task": path.stem, **config})
    except Exception as error:  # lm-eval, its templates and the hub may raise anything
        raise UsageError(f"{path}: lm-eval cannot make a task of it ({brief(error)})") from error


def _manager() -> Any:
    """lm-eval's index of all its tasks; building it takes seconds."""
    return import_module("lm_eval.tasks").TaskManager()


def _with_own_definition(manager: Any, file: TaskFile) -> Any:
    """lm-eval's own task of this name, with the rows of a file as its data."""
    member = {"task": file.name, **file.overrides()}
    try:
        return manager.load([{"group": _FILES, "task": [member]}])["tasks"][file.name]
    except Exception as error:  # its definition may raise anything
        raise UsageError(f"{file.path}: lm-eval cannot read it as {file.name} ({brief(error)})") from error


def _unreadable(task: Any, file: TaskFile) -> Iterator[str]:
    """Problems of lines that lm-eval's definition cannot read, or whose right answer is not among the answers."""
    for line, row in zip(file.lines, task.eval_docs, strict=True):
        try:
            answers = len(task.doc_to_choice(row))
            text, right = task.doc_to_text(row), task.doc_to_target(row)
        except Exception as error:  # its templates may raise anything
            yield f"{file.path}, line {line}: lm-eval cannot read it as {file.name} ({brief(error)})"
            continue
        index = text if isinstance(text, int) else right  # where the answers are contexts, the target is an index
        if not isinstance(index, int) or not 0 <= index < answers:
            right = f"the right answer is {index!r}, and there are {answers} (0 to {answers - 1})"
            yield f"{file.path}, line {line}: {right}"


def _from_hub(names: Sequence[str]) -> list[Any]:
    if not names:
        return []
    manager = _manager()
    problems = []
    for name in names:
        if not manager.match_tasks([name]):
            close = difflib.get_close_matches(name, [PAPER, *manager.all_tasks], n=3)
            hint = f"; is it {' or '.join(close)}?" if close else "; `lm-eval ls tasks` lists those that there are"
            problems.append(f"task {name!r} is unknown to lm-eval {version('lm_eval')}, and is no file{hint}")
    raise_problems(problems)
    return [task for name in names for task in _load(manager, name)]


def _load(manager: Any, name: str) -> list[Any]:
    """The task or group with this name, or the tasks with this tag."""
    try:
        found = manager.load(manager.match_tasks([name]))
    except Exception as error:  # network, hub, builder and file errors alike; the remedy is the same
        raise UsageError(
            f"task {name!r}: its data cannot be loaded ({brief(error)}). Without a network, give a file, {name}.jsonl, "
            "or a --task-folder that has it; or load it once where there is a network, copy the folder that "
            "HF_DATASETS_CACHE names, and set HF_HUB_OFFLINE=1"
        ) from error
    groups = list(found["groups"].values())
    inner = {part for group in groups for part in (*tasks_in(group), *groups_in(group))}
    return [*(g for g in groups if g.name not in inner), *(t for n, t in found["tasks"].items() if n not in inner)]


def tasks_in(group: Any) -> list[str]:
    """Names of the tasks in a group of lm-eval's, at any depth."""
    return [task.task_name for task in group.get_all_tasks()]


def groups_in(group: Any) -> list[str]:
    """Names of the groups in a group of lm-eval's, at any depth."""
    return [inner.name for inner in group.get_all_groups()]


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager: lm-eval and the hub log errors only; we report what matters ourselves."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    levels = [other.level for other in loggers]
    for other in loggers:
        other.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for other, level in zip(loggers, levels, strict=True):
            other.setLevel(level)
