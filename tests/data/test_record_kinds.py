"""Conversations and tables in the forms that the field has, and columns with other names."""

from __future__ import annotations

import copy
import json

import pytest

from spp.data.examples import IGNORED, whole_examples
from spp.data.records import load_records, stream_records
from spp.data.tokens import render
from spp.errors import UsageError
from spp.training.options import TrainOptions
from spp.training.training_data import training_examples

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CHAT = {"messages": [USER, ANSWER]}
CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "sum", "parameters": {}}}
TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}"
    "{% endfor %}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def read(tmp_path, *rows, columns=None):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_records(str(path), columns=columns)


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, CHAT),
        (
            {"system": "Be brief.", "conversations": [{"from": "user", "value": "Hi"}], "id": "x"},
            {"messages": [{"role": "system", "content": "Be brief."}, USER]},
        ),
        ({"conversations": [USER, ANSWER]}, CHAT),
        ({"prompt": [USER], "completion": [ANSWER]}, {**CHAT, "answers_from": 1}),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]},
            {"messages": [USER]},
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]},
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [TOOL]},
        ),
        (  # as APIs and tables have it: arguments and tools as JSON, empty fields as null
            {
                "messages": [
                    {**USER, "tool_calls": None},
                    {"role": "assistant", "tool_calls": [{"function": {"name": "sum", "arguments": '{"a": 1}'}}]},
                    {"role": "tool", "content": "3", "tool_call_id": "7", "name": "sum"},
                ],
                "tools": json.dumps([TOOL]),
            },
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"function": {"name": "sum", "arguments": {"a": 1}}}],
                    },
                    {"role": "tool", "content": "3", "tool_call_id": "7", "name": "sum"},
                ],
                "tools": [TOOL],
            },
        ),
    ],
)
def test_conversations_of_every_form_are_messages(tmp_path, row, record):
    assert read(tmp_path, row) == [record]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"conversations": "Hi"}, "expected conversations to be a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]}, "parts of text only"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}, "half of a surrogate pair"),
        ({"messages": [{"role": "assistant", "tool_calls": "sum"}]}, "tool_calls to be a list of objects"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"arguments": "{"}]}]}, "arguments to be JSON"),
        ({"messages": [USER], "tools": "sum"}, "tools to be JSON"),
        ({"messages": [USER], "tools": [1]}, "tools to be a list of objects"),
        ({"question": "a", "answer": "b"}, "--columns prompt=question,completion=answer"),
    ],
)
def test_what_is_none_is_refused(tmp_path, row, words):
    with pytest.raises(UsageError, match=words):
        read(tmp_path, row)


def test_tools_and_calls_reach_the_template(tmp_path, tiny_tokenizer):
    tiny_tokenizer = copy.deepcopy(tiny_tokenizer)
    tiny_tokenizer.chat_template = TEMPLATE
    [record] = read(tmp_path, {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]})
    assert render(record, tiny_tokenizer) == "[sum]<user>Hi</><assistant>1</>"


def test_a_conversational_completion_alone_is_learned(tmp_path, tiny_tokenizer):
    tiny_tokenizer = copy.deepcopy(tiny_tokenizer)
    tiny_tokenizer.chat_template = TEMPLATE
    before = [USER, {"role": "assistant", "content": "no"}, USER]
    records = read(tmp_path, {"prompt": before, "completion": [ANSWER]})
    [example] = whole_examples(records, tiny_tokenizer, completion_only=True)
    learned = tiny_tokenizer.decode([one for one in example.labels if one != IGNORED]).replace(" ", "")
    assert learned == "Hello</>"


def test_columns_with_other_names(tmp_path):
    columns = {"prompt": "question", "completion": "answer"}
    record = {"prompt": "1+1=", "completion": "2"}
    assert read(tmp_path, {"question": "1+1=", "answer": "2", "text": "other"}, columns=columns) == [record]
    assert read(tmp_path, record, columns=columns) == [record]  # a table without these names is as it is
    with pytest.raises(UsageError, match="columns names answer, which is not there; found question"):
        read(tmp_path, {"question": "1+1="}, columns=columns)


def test_columns_of_parquet_and_of_training(tmp_path, tiny_tokenizer, tiny_checkpoint):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"id": [1], "question": ["1+1="], "answer": ["2"], "input": ["x"]}), path)
    options = TrainOptions.build(
        {
            "model": str(tiny_checkpoint),
            "out": tmp_path / "out",
            "data": str(path),
            "columns": "prompt=question, completion=answer",
        }
    )
    [example], _ = training_examples(options, tiny_checkpoint, 64, 96)
    assert tiny_tokenizer.decode(example.input_ids, skip_special_tokens=True).replace(" ", "") == "1+1=2"


@pytest.mark.parametrize("text", ['{"text": ""}\n{"text": " \\n"}\n', '{"prompt": " ", "completion": ""}\n'])
def test_data_without_text_is_refused_as_a_stream_too(tmp_path, text, tiny_checkpoint):
    (path := tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(UsageError, match="there is no text in it"):
        list(stream_records(str(path)))
    options = TrainOptions(model=str(tiny_checkpoint), out=tmp_path / "out", data=str(path), max_tokens=8)
    with pytest.raises(UsageError, match="there is no text in it"):
        training_examples(options, tiny_checkpoint, 64, 96)


def test_records_before_the_first_text_are_kept(tmp_path):
    (path := tmp_path / "data.jsonl").write_text('{"text": ""}\n{"text": "a"}\n{"text": ""}\n')
    assert [record["text"] for record in stream_records(str(path))] == ["", "a", ""]
