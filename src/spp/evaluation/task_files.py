"""Tasks from files, for machines without a hub: one JSON object per line, made into tasks of lm-eval.

A file has one of two forms. Ours has the fields of a row of `_TEXTS`, `choices` (the answers) and `label` (the index of
the right answer); rows with the fields of published data sets are turned into it (see `task_fields`). The other is the
hub's data set for one of the paper's tasks, written with `datasets`' `to_json`; it is read with lm-eval's own
definition of the task that the file is named after.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp.data.record_kinds import Malformed
from spp.data.records import json_lines, open_text, raise_first_problems
from spp.errors import UsageError, shown
from spp.evaluation.task_fields import in_our_form

PAPER_TASKS = {
    "boolq": ("passage", "question", "label"),
    "rte": ("sentence1", "sentence2", "label"),
    "hellaswag": ("ctx_a", "ctx_b", "activity_label", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
}
"""The seven zero-shot tasks of the SPP paper, and the columns of their data sets that lm-eval reads."""

# Fields of a question -> lm-eval's prompt for it: that of BoolQ, of RTE, and for all other tasks that of ARC.
_TEXTS = {
    ("passage", "question"): "{{passage}}\nQuestion: {{question}}?\nAnswer:",
    ("premise", "hypothesis"): "{{premise}}\nQuestion: {{hypothesis}} True or False?\nAnswer:",
    ("question",): "Question: {{question}}\nAnswer:",
    ("context",): "{{context}}",
    ("sentence",): "",  # its blank is filled instead
}
_CONTINUED = ("hellaswag", "openbookqa")  # the prompt is the bare question, which the answers continue
_BLANK = "_"  # the blank in winogrande's sentences, which the answers fill
_SPLIT = "test"


@dataclass(frozen=True)
class TaskFile:
    """A task in a file.

    Attributes:
        name: name of the task; lm-eval's name for one of the paper's tasks.
        path: the file.
        rows: the file's lines, reduced to the fields that are used.
        lines: the line number of each row.
        hub_form: whether the rows have the hub's columns.
        sha256: hash of the file as read.
    """

    name: str
    path: Path
    rows: list[dict[str, Any]]
    lines: list[int]
    hub_form: bool
    sha256: str

    def overrides(self) -> dict[str, Any]:
        """Changes to lm-eval's own definition of the task, so that it reads this file."""
        from datasets import Dataset

        try:
            data = {_SPLIT: Dataset.from_list(self.rows)}
        except Exception as error:  # pyarrow raises another class for each kind of mixed column
            raise UsageError(f"{self.path}: its columns cannot be read ({error})") from error
        return {
            "custom_dataset": lambda **_: data,
            "training_split": None,
            "validation_split": None,
            "test_split": _SPLIT,
            "fewshot_split": _SPLIT,
        }

    def config(self) -> dict[str, Any]:
        """lm-eval's definition of a task in our form: multiple choice, with acc and acc_norm."""
        means = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
        return {
            "task": self.name,
            "output_type": "multiple_choice",
            "metric_list": means,
            "metadata": {"version": 1.0},
            **self._prompt(),
            **self.overrides(),
        }

    def _prompt(self) -> dict[str, Any]:
        fields = tuple(self.rows[0])[:-2]  # choices and label are the last
        blanks = (
            self.name == "winogrande" and "passage" not in fields and all(_BLANK in _sentence(row) for row in self.rows)
        )
        if fields == ("sentence",) or blanks:
            return {"doc_to_text": "label", "doc_to_choice": _filled, "doc_to_target": _after_blank}
        text = "question" if self.name in _CONTINUED and fields == ("question",) else _TEXTS[fields]
        return {"doc_to_text": text, "doc_to_choice": "choices", "doc_to_target": "label"}


def _sentence(row: Mapping[str, Any]) -> str:
    return row.get("sentence") or row.get("question", "")


def _filled(row: Mapping[str, Any]) -> list[str]:
    """The sentence up to the blank, filled with each answer: the contexts in which the rest is scored."""
    before = _sentence(row).split(_BLANK, 1)[0]
    return [before + answer for answer in row["choices"]]


def _after_blank(row: Mapping[str, Any]) -> str:
    return _sentence(row).split(_BLANK, 1)[1].strip()


def read_task_files(paths: Mapping[str, Path]) -> list[TaskFile]:
    """Read task files, given by the names of the tasks.

    Raises:
        UsageError: lists the problems of all files: file, line, what was expected, and what was found.
    """
    files: list[TaskFile] = []
    problems: list[str] = []
    for name, path in paths.items():
        try:
            file, found = _read(name, path)
        except UsageError as error:  # missing, or not text
            problems.append(str(error))
            continue
        problems += found
        files.append(file)
    raise_first_problems(problems)
    return files


def _read(name: str, path: Path) -> tuple[TaskFile, list[str]]:
    """A file, and its problems."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    problems: list[str] = []
    check: Callable[[Any], dict[str, Any]] | None = None
    fields = ""
    with open_text(path) as file:
        for where, item in json_lines(file):
            check = check or _form(name, item)
            try:
                row = check(item)
                if fields and fields != " and ".join(row):
                    raise Malformed(f"it has {' and '.join(row)}, and the lines before have {fields}")
            except Malformed as error:
                problems.append(f"{path}, {where}: {error}")
                continue
            fields = " and ".join(row)
            rows.append(row)
            lines.append(int(where.removeprefix("line ")))
    if check is None:
        problems.append(f"{path}: the file is empty; expected one JSON object per line")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return TaskFile(name, path, rows, lines, check is not None and check is not _ours, digest), problems


def _form(name: str, item: Any) -> Callable[[Any], dict[str, Any]]:
    """The function that reads the rows of a file whose first line is `item`."""
    columns = PAPER_TASKS.get(name, ())
    given = item if isinstance(item, dict) else {}
    hub_form = columns and set(columns) <= given.keys() and not isinstance(given.get("choices"), list)
    return (lambda item: _of_the_hub(item, columns)) if hub_form else _ours


def _of_the_hub(item: Any, columns: tuple[str, ...]) -> dict[str, Any]:
    row = _object(item)
    if missing := [name for name in columns if name not in row]:
        raise Malformed(f"expected the columns {', '.join(columns)}; {', '.join(missing)} is missing")
    return {name: row[name] for name in columns}


def _ours(item: Any) -> dict[str, Any]:
    row = in_our_form(_object(item))
    fields = next((fields for fields in _TEXTS if set(fields) <= row.keys()), None)
    if fields is None or not {"choices", "label"} <= row.keys():
        found = ", ".join(map(str, row)) or "no field"
        raise Malformed(
            "expected question, or passage and question, or premise and hypothesis, or context, with choices and "
            f"label, or the fields of a published data set; found {found[:200]}"
        )
    choices, label = row["choices"], row["label"]
    wrong = list(_wrong_texts(row, fields))
    several = isinstance(choices, list) and len(choices) > 1
    if not several or not all(isinstance(answer, str) and answer for answer in choices):
        wrong.append(f"expected choices to be a list of two strings or more, none empty; found {shown(choices)}")
    elif not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        wrong.append(
            f"expected label to be the index of the right choice, 0 to {len(choices) - 1}; found {shown(label)}"
        )
    if wrong:
        raise Malformed("; ".join(wrong))
    return {name: row[name] for name in (*fields, "choices", "label")}


def _wrong_texts(row: Mapping[str, Any], fields: tuple[str, ...]) -> Iterator[str]:
    for name in fields:
        if not isinstance(row[name], str) or not row[name].strip():
            yield f"expected {name} to be a string that is not empty; found {shown(row[name])}"
        elif name == "sentence" and _BLANK not in row[name]:
            yield f"expected sentence to hold the blank {_BLANK}; found {shown(row[name])}"


def _object(item: Any) -> dict[str, Any]:
    if isinstance(item, Malformed):
        raise item
    if not isinstance(item, dict):
        raise Malformed(f"expected an object; found {shown(item)}")
    return item
