"""Rows of published data sets, with their own names of fields, in the form of our task files.

HellaSwag has ctx and endings, PIQA goal, sol1 and sol2, WinoGrande sentence, option1 and option2, ARC and OpenBookQA an
answerKey, RTE sentence1 and sentence2, BoolQ a yes or no. The prompts are lm-eval's for these tasks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from spp.data.record_kinds import Malformed
from spp.errors import shown

Row = Mapping[str, Any]


def in_our_form(row: Row) -> dict[str, Any]:
    """A row with our fields; one that is in none of the known forms, as it is.

    Raises:
        Malformed: the row has the fields of a known form, but not their values.
    """
    for fields, convert in _FORMS:
        if set(fields) <= row.keys():
            return convert(row)
    return dict(row)


def _hellaswag(row: Row) -> dict[str, Any]:
    if "ctx_a" in row:
        context = f"{_text(row, 'ctx_a')} {_text(row, 'ctx_b', empty=True).capitalize()}"
    else:
        context = _text(row, "ctx")
    if row.get("activity_label"):
        context = f"{_text(row, 'activity_label')}: {context}"
    endings = row["endings"]
    if not isinstance(endings, list) or not all(isinstance(one, str) for one in endings):
        raise Malformed(f"expected endings to be a list of strings; found {shown(endings)}")
    return {"context": _cleaned(context), "choices": [_cleaned(one) for one in endings], "label": _index(row, "label")}


def _cleaned(text: str) -> str:
    """Without the marks of WikiHow, from which HellaSwag was made; as lm-eval does it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _piqa(row: Row) -> dict[str, Any]:
    choices = [_text(row, "sol1"), _text(row, "sol2")]
    return {"question": _text(row, "goal"), "choices": choices, "label": _index(row, "label")}


def _winogrande(row: Row) -> dict[str, Any]:
    choices, answer = [_text(row, "option1"), _text(row, "option2")], row.get("answer")
    if str(answer) not in ("1", "2"):
        raise Malformed(f"expected answer to be 1 or 2; found {shown(answer)}")
    return {"sentence": _text(row, "sentence"), "choices": choices, "label": int(str(answer)) - 1}


def _openbookqa(row: Row) -> dict[str, Any]:
    return {"context": _text(row, "question_stem"), **_lettered(row["choices"], row)}


def _arc(row: Row) -> dict[str, Any]:
    inner = row["question"]
    if isinstance(inner, dict):  # the files of the authors
        return {"question": _text(inner, "stem"), **_lettered(inner.get("choices"), row)}
    return {"question": _text(row, "question"), **_lettered(row.get("choices"), row)}


def _lettered(choices: Any, row: Row) -> dict[str, Any]:
    """Answers with letters, of which `answerKey` is one: a list of pairs, or two lists."""
    if isinstance(choices, list) and all(isinstance(one, dict) for one in choices):
        choices = {name: [one.get(name) for one in choices] for name in ("text", "label")}
    if not isinstance(choices, dict) or not all(isinstance(choices.get(name), list) for name in ("text", "label")):
        raise Malformed(f"expected choices with text and label; found {shown(choices)}")
    letters = [str(letter) for letter in choices["label"]]
    if str(row["answerKey"]) not in letters:
        raise Malformed(f"expected answerKey to be one of {', '.join(letters)}; found {shown(row['answerKey'])}")
    return {"choices": choices["text"], "label": letters.index(str(row["answerKey"]))}


def _rte(row: Row) -> dict[str, Any]:
    texts = {"premise": _text(row, "sentence1"), "hypothesis": _text(row, "sentence2")}
    label = {"entailment": 0, "not_entailment": 1}.get(str(row["label"]))
    return {**texts, "choices": ["True", "False"], "label": _index(row, "label") if label is None else label}


def _boolq(row: Row) -> dict[str, Any]:
    texts = {name: _text(row, name) for name in ("passage", "question")}
    name = "answer" if "answer" in row else "label"
    label = int(row[name]) if isinstance(row.get(name), bool) else _index(row, name)
    return {**texts, "choices": ["no", "yes"], "label": label}


def _text(row: Row, name: str, *, empty: bool = False) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise Malformed(f"expected {name} to be a string that is not empty; found {shown(value)}")
    return value


def _index(row: Row, name: str) -> int:
    """An index, which some files hold as a string; test sets without answers have an empty one, or -1."""
    value = row.get(name)
    if isinstance(value, str) and re.fullmatch(r"\d{1,3}", value):
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Malformed(f"expected {name} to be the index of the right answer, from 0; found {shown(value)}")
    return value


_FORMS: tuple[tuple[tuple[str, ...], Callable[[Row], dict[str, Any]]], ...] = (
    (("ctx_a", "ctx_b", "endings"), _hellaswag),
    (("ctx", "endings"), _hellaswag),
    (("goal", "sol1", "sol2"), _piqa),
    (("sentence", "option1", "option2"), _winogrande),
    (("question_stem", "choices", "answerKey"), _openbookqa),
    (("question", "answerKey"), _arc),
    (("sentence1", "sentence2", "label"), _rte),
    (("passage", "question", "answer"), _boolq),
)
