"""Files of data sets with their own fields: the same items as in our form, whatever the file is called."""

from __future__ import annotations

import json

import pytest

from spp.errors import UsageError
from spp.evaluation.task_files import read_task_files

PAIRS = [{"text": "ice", "label": "A"}, {"text": "fire", "label": "B"}]
LISTS = {"text": ["ice", "fire"], "label": ["1", "2"]}
ROWS = {
    "hellaswag": (
        {
            "ind": 4,
            "activity_label": "Baking [x]",
            "ctx_a": "She opens the oven.",
            "ctx_b": "she",
            "ctx": "She opens the oven. she",
            "endings": ["sings [title] on", "bakes  a cake."],
            "label": "1",
            "source_id": "a",
        },
        {"context": "Baking : She opens the oven. She", "choices": ["sings. on", "bakes a cake."], "label": 1},
    ),
    "hellaswag, context alone": (
        {"ctx": "She opens", "endings": ["a door", "a book"], "label": 0},
        {"context": "She opens", "choices": ["a door", "a book"], "label": 0},
    ),
    "piqa": (
        {"goal": "Cool a drink", "sol1": "Use ice.", "sol2": "Use fire.", "label": 0},
        {"question": "Cool a drink", "choices": ["Use ice.", "Use fire."], "label": 0},
    ),
    "winogrande": (
        {"qID": "x", "sentence": "Ann thanked _ .", "option1": "Ann", "option2": "Eve", "answer": "2"},
        {"sentence": "Ann thanked _ .", "choices": ["Ann", "Eve"], "label": 1},
    ),
    "arc of the hub": (
        {"id": "x", "question": "What melts?", "choices": LISTS, "answerKey": "1"},
        {"question": "What melts?", "choices": ["ice", "fire"], "label": 0},
    ),
    "arc of its authors": (
        {"id": "x", "question": {"stem": "What melts?", "choices": PAIRS}, "answerKey": "A"},
        {"question": "What melts?", "choices": ["ice", "fire"], "label": 0},
    ),
    "openbookqa": (
        {"question_stem": "Ice", "choices": LISTS, "answerKey": "2"},
        {"context": "Ice", "choices": ["ice", "fire"], "label": 1},
    ),
    "rte": (
        {"sentence1": "It rains.", "sentence2": "It is wet.", "label": "not_entailment"},
        {"premise": "It rains.", "hypothesis": "It is wet.", "choices": ["True", "False"], "label": 1},
    ),
    "boolq": (
        {"question": "is a set ordered", "passage": "A set has no order.", "answer": False, "title": "Set"},
        {"passage": "A set has no order.", "question": "is a set ordered", "choices": ["no", "yes"], "label": 0},
    ),
}


def rows_of(tmp_path, row):
    (path := tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    [file] = read_task_files({"mine": path})
    return file


@pytest.mark.parametrize("name", ROWS)
def test_fields_of_published_data_sets_are_ours(tmp_path, name):
    row, ours = ROWS[name]
    file = rows_of(tmp_path, row)
    assert file.rows == [ours] and not file.hub_form


@pytest.mark.parametrize(
    ("name", "prompt", "choices"),
    [
        ("piqa", "Question: {{question}}\nAnswer:", "choices"),
        ("openbookqa", "{{context}}", "choices"),
        ("hellaswag", "{{context}}", "choices"),
    ],
)
def test_their_prompts_are_those_of_lm_eval(tmp_path, name, prompt, choices):
    config = rows_of(tmp_path, ROWS[name][0])._prompt()
    assert (config["doc_to_text"], config["doc_to_choice"]) == (prompt, choices)


def test_the_blank_of_winogrande_is_filled_in_a_file_of_any_name(tmp_path):
    file = rows_of(tmp_path, ROWS["winogrande"][0])
    config = file._prompt()
    assert config["doc_to_choice"](file.rows[0]) == ["Ann thanked Ann", "Ann thanked Eve"]
    assert config["doc_to_target"](file.rows[0]) == "."


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("hellaswag", {"label": ""}, "label to be the index of the right answer.*''"),
        ("hellaswag", {"label": -1}, "label to be the index.*-1"),
        ("hellaswag", {"label": "9" * 5000}, "label to be the index"),
        ("hellaswag", {"endings": "none"}, "endings to be a list"),
        ("piqa", {"sol2": ""}, "sol2 to be a string that is not empty"),
        ("piqa", {"label": 2}, "0 to 1; found 2"),
        ("winogrande", {"answer": ""}, "answer to be 1 or 2"),
        ("winogrande", {"sentence": "Ann left."}, "hold the blank _"),
        ("arc of the hub", {"answerKey": "E"}, "answerKey to be one of 1, 2; found 'E'"),
        ("arc of the hub", {"choices": ["ice"]}, "choices with text and label"),
    ],
)
def test_their_mistakes_are_named(tmp_path, name, changes, words):
    with pytest.raises(UsageError, match=f"line 1: .*{words}"):
        rows_of(tmp_path, {**ROWS[name][0], **changes})
