"""Every kind of data file, well-formed and not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spp.data.alpaca import alpaca_prompt
from spp.data.records import load_records
from spp.errors import UsageError

ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
KINDS = [
    ([{"text": "one"}, {"text": "two"}], [{"text": "one"}, {"text": "two"}]),
    ([{"prompt": "a", "completion": "b"}], [{"prompt": "a", "completion": "b"}]),
    ([{"completion": "b", "prompt": "a", "id": 7}], [{"prompt": "a", "completion": "b"}]),
    ([ALPACA], [{"prompt": alpaca_prompt("Add.", "1 and 2"), "completion": "3"}]),
    ([{"instruction": "Sing.", "output": "La"}], [{"prompt": alpaca_prompt("Sing."), "completion": "La"}]),
    ([{**ALPACA, "text": "all of it, rendered"}], [{"prompt": alpaca_prompt("Add.", "1 and 2"), "completion": "3"}]),
    ([CHAT], [CHAT]),
    ([{"messages": [{"role": "user", "content": "Hi", "name": "Eve"}]}], [{"messages": CHAT["messages"][:1]}]),
]


@pytest.fixture
def write(tmp_path):
    """Write one file and return its path as a source."""

    def call(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return call


def problem(source: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_records(source)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".JSON"])
@pytest.mark.parametrize(("items", "expected"), KINDS)
def test_every_kind_from_every_file(tmp_path, suffix, items, expected):
    path = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), path)
    else:
        path.write_text(json.dumps(items, indent=2))
    assert load_records(str(path)) == expected


def test_a_text_file_is_one_record(write):
    assert load_records(write("a.txt", " One.\n\nTwo.\n")) == [{"text": " One.\n\nTwo.\n"}]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "c4-train.00000-of-01024.json.gz", "A.JSON.GZ"])
@pytest.mark.parametrize("array", [False, True])
def test_compressed_json_is_read(write, name, array):
    items = [{"text": "one", "url": "x"}, {"text": "two", "url": "y"}]
    content = json.dumps(items) if array else "\n".join(map(json.dumps, items))
    assert load_records(write(name, gzip.compress(content.encode()))) == [{"text": "one"}, {"text": "two"}]


def test_compressed_text_is_one_record(write):
    content = gzip.compress(b"\xef\xbb\xbf One.\r\n") + gzip.compress(b"Two.\n")  # members make one file together
    assert load_records(write("a.txt.gz", content)) == [{"text": " One.\nTwo.\n"}]


LINES = gzip.compress(b"".join(json.dumps({"text": str(i)}).encode() + b"\n" for i in range(20_000)))


@pytest.mark.parametrize(
    "content",
    [
        LINES[:-4],
        LINES[: len(LINES) // 2],
        LINES[:1000] + bytes(8) + LINES[1008:],
        LINES[:-8] + b"\0" + LINES[-7:],
        b'{"text": "not compressed"}',
    ],
)
def test_damaged_gzip_is_one_error(write, content):
    message = problem(source := write("a.json.gz", content))
    assert message.startswith(f"{source}: not a whole gzip file (")
    assert "copy or download it again" in message
    assert len(message.splitlines()) == 1


def test_bad_utf8_in_a_compressed_file_is_named_with_its_line(write):
    source = write("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999 + b'{"text": "caf\xe9"}\n'))
    assert problem(source) == f"{source}, line 10000: expected UTF-8 text; found byte 0xe9; convert it"


def test_an_array_may_follow_blank_lines(write):
    assert load_records(write("a.json", '\n \n[{"text": "one"}]')) == [{"text": "one"}]
    assert "b.json, line 4: expected a JSON array" in problem(write("b.json", '\n\n[{"text": "one"},\nnope]'))


def test_the_standard_library_comes_in_parts(monkeypatch):
    monkeypatch.setattr("spp.data.records.standard_library", lambda part: [f"{part} 1", f"{part} 2"])
    assert load_records("python-stdlib", "evaluation") == [{"text": "evaluation 1"}, {"text": "evaluation 2"}]
    assert load_records("python-stdlib") == [{"text": "train 1"}, {"text": "train 2"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_windows_line_ends_and_a_byte_order_mark_are_no_part_of_the_text(write, name):
    content = "one\r\ntwo\r\n" if name == "a.txt" else '{"text": "one"}\r\n\r\n{"text": "two"}\r\n'
    records = load_records(write(name, b"\xef\xbb\xbf" + content.encode()))
    assert "".join(record["text"] for record in records) == ("one\ntwo\n" if name == "a.txt" else "onetwo")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_unicode_line_separators_do_not_end_a_line(write, separator):
    text = f"one{separator}two"
    raw = json.dumps({"text": text}, ensure_ascii=separator < " ")  # control characters must be escaped in JSON
    assert load_records(write("a.jsonl", raw + "\n" + raw)) == [{"text": text}] * 2


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1), ascii_only=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_json_lines_give_back_any_text(tmp_path, texts, ascii_only):
    path = tmp_path / "any.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) for text in [*texts, "."]]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert [record["text"] for record in load_records(str(path))] == [*texts, "."]


@pytest.mark.parametrize("content", ["", "\n\n", "[]", "[\n]", '{"text": ""}\n{"text": " \\n"}'])
def test_no_text_is_an_error(write, content):
    assert "is empty" in problem(write("a.jsonl", content))


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b" \r\n"])
def test_an_empty_text_file_is_an_error(write, content):
    assert "is empty" in problem(write("a.txt", content))


def test_an_empty_parquet_file_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert "is empty" in problem(str(path))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "expected one JSON object per line"),
        ('{"text": "a"} x', "expected one JSON object per line"),
        ("[" * 100_000, "expected one JSON object per line"),
        ("3", "expected an object with text, or prompt and completion.*found 3"),
        ("null", "expected an object.*found None"),
        ("{}", "expected text.*found no field"),
        ('{"body": "a", "id": 1}', "expected text.*found body, id"),
        ('{"prompt": "a"}', "expected text.*found prompt"),
        ('{"instruction": "a", "input": ""}', "expected text.*found instruction, input"),
        ('{"text": "a", "messages": []}', "of one kind only; found text, messages"),
        ('{"text": 3}', "expected text to be a string; found 3"),
        ('{"text": null}', "expected text to be a string; found None"),
        ('{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}', "expected prompt to be a string"),
        ('{"instruction": "a", "input": 0, "output": "b"}', "expected input to be a string; found 0"),
        ('{"messages": "hello"}', "expected messages to be a list.*found 'hello'"),
        ('{"messages": []}', r"expected messages to be a list.*found \[\]"),
        ('{"messages": [{"role": "user"}]}', "every message to have role and content"),
        ('{"messages": ["hello"]}', "every message to have role and content; found 'hello'"),
        ('{"messages": [{"role": "user", "content": null}]}', "expected content to be a string; found None"),
        ('{"text": "half \\ud83d"}', "text holds half of a surrogate pair at character 5"),
    ],
)
def test_a_malformed_line_is_named(write, line, complaint):
    source = write("a.jsonl", f'{{"text": "good"}}\n\n{line}\n{{"text": "good"}}\n')
    with pytest.raises(UsageError, match=complaint) as caught:
        load_records(source)
    message = str(caught.value)
    assert message.startswith(f"{source}, line 3: ")
    assert len(message.splitlines()) == 1
    assert len(message) < 500


def test_an_array_names_items_and_the_line_of_a_syntax_error(write):
    assert "item 2: expected text to be a string; found 5" in problem(write("a.json", '[{"text": "a"}, {"text": 5}]'))
    assert "b.json, line 3: expected a JSON array" in problem(write("b.json", '[\n{"text": "a"},\nnope\n]'))


def test_parquet_names_rows_and_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    assert "row 2: expected text to be a string; found None" in problem(str(tmp_path / "a.parquet"))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), tmp_path / "b.parquet")
    assert "found body, n" in problem(str(tmp_path / "b.parquet"))
    (tmp_path / "c.parquet").write_text("text")
    assert "c.parquet: not a readable parquet file" in problem(str(tmp_path / "c.parquet"))


def test_mixed_kinds_are_refused(write):
    message = problem(write("a.jsonl", json.dumps(ALPACA) + '\n{"text": "a"}\n{"prompt": "a", "completion": "b"}'))
    assert "line 2: kinds are mixed: text here, but prompt and completion in line 1" in message
    assert "line 3" not in message  # Alpaca items are prompts and completions


def test_several_problems_are_reported_together(write):
    message = problem(write("a.jsonl", '{"text": 1}\n{"text": "good"}\n{\n' + json.dumps(CHAT)))
    assert message.startswith("3 problems:")
    assert [number for number in range(1, 6) if f"a.jsonl, line {number}:" in message] == [1, 3, 4]


def test_many_problems_are_counted_and_the_first_shown(write):
    message = problem(write("a.jsonl", "3\n" * 25))
    assert message.startswith("25 problems, the first 10 of them:")
    assert "line 10:" in message
    assert "line 11:" not in message


def test_bad_utf8_is_named_with_its_line(write):
    source = write("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n{"text": "caf\xe9"}\n')
    assert problem(source) == f"{source}, line 2: expected UTF-8 text; found byte 0xe9; convert it"
    assert "line 1: expected UTF-8" in problem(write("b.txt", "wide".encode("utf-16")))


@pytest.mark.parametrize(
    "name",
    ["lost.jsonl", "no/where/lost.txt", "/lost", "../x", "./x/y", "two words", "a:b:c:d", "lost.json.gz", "a:b:c[:"],
)
def test_what_can_only_be_a_file_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr("spp.data.records._read_dataset", lambda *_: pytest.fail("asked the hub"))
    assert problem(name) == f"data {name!r}: no such file"


def test_a_folder_is_no_data(tmp_path):
    assert "is a folder; give a file" in problem(str(tmp_path))


@pytest.mark.parametrize("name", ["a.csv", "a", "a.gz", "a.csv.gz", "a.parquet.gz", "a.jsonl.zst"])
def test_an_unknown_suffix_names_the_known_ones(write, name):
    assert "must be one of .txt, .jsonl, .json, .parquet" in problem(write(name, "text"))


@pytest.mark.parametrize("source", ["nobody/nothing", "nothing:config:test"])
def test_a_dataset_out_of_reach_is_one_error_that_names_ways_out(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it would try for 20 seconds
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = problem(source)
    assert repr(source) in message
    assert "no such file, and not available as a dataset" in message
    assert "give a file (.txt, .jsonl, .json, .parquet, .txt.gz, .jsonl.gz, .json.gz)" in message
    assert "HF_DATASETS_CACHE" in message
    assert "HF_HUB_OFFLINE=1" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("squad", ("squad", None, "train")),
        ("allenai/c4:en", ("allenai/c4", "en", "train")),
        ("a/b:c:validation", ("a/b", "c", "validation")),
        ("a/b::test", ("a/b", None, "test")),
        ("a/b:c:train[:1%]", ("a/b", "c", "train[:1%]")),
        ("a/b::train[:1%]+test[2:5]", ("a/b", None, "train[:1%]+test[2:5]")),
    ],
)
def test_a_datasets_id_names_config_and_split(source, asked, monkeypatch):
    import datasets

    def load_dataset(name, config, *, split):
        assert (name, config, split) == asked
        return datasets.Dataset.from_dict({"text": ["one", "two"], "url": ["x", "y"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_records(source) == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize("name", ["train[:1%]", "train[10:20]"])
def test_a_slice_without_a_split_is_explained(name):
    assert f"write a/b::{name}, or a/b:CONFIG:{name}" in problem(f"a/b:{name}")


class Stream:
    """What of `datasets.IterableDataset` is used; it counts the rows that it gave."""

    def __init__(self, rows, column_names=None):
        self.rows, self.column_names, self.given = rows, column_names, 0

    def select_columns(self, names):
        self.rows = ({name: row[name] for name in names} for row in self.rows)
        return self

    def __iter__(self):
        for row in self.rows:
            self.given += 1
            yield row


@pytest.mark.parametrize("column_names", [None, ["text", "url"]])
def test_calibration_reads_the_first_rows_of_a_dataset_as_a_stream(column_names, monkeypatch):
    stream = Stream(({"text": str(number), "url": "x"} for number in range(10**9)), column_names)

    def load_dataset(name, config, *, split, streaming):
        assert (name, config, split, streaming) == ("allenai/c4", "en", "train", True)
        return stream

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_records("allenai/c4:en", "calibration") == [{"text": str(number)} for number in range(16_384)]
    assert stream.given == 16_384


def test_calibration_reads_fewer_rows_where_they_are_long(monkeypatch):
    stream = Stream({"text": "book " * 100} for _ in range(10**9))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: stream)
    monkeypatch.setattr("spp.data.records._STREAMED_CHARACTERS", 1200)
    assert len(load_records("a/books", "calibration")) == 3


def test_a_real_stream_is_read(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["one", "", "two"], "url": ["x", "y", "z"]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert load_records("a/b", "calibration") == [{"text": "one"}, {"text": ""}, {"text": "two"}]


def test_a_slice_is_not_streamed(monkeypatch):
    import datasets

    def load_dataset(name, config, *, split):
        assert split == "train[:1%]"
        return datasets.Dataset.from_dict({"text": ["one"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_records("a/b:c:train[:1%]", "calibration") == [{"text": "one"}]


def test_a_stream_that_breaks_off_names_ways_out(monkeypatch):
    def rows():
        yield {"text": "one"}
        raise ConnectionError("the hub went away")

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Stream(rows()))
    with pytest.raises(UsageError, match=r"not available.*\(the hub went away\).*HF_DATASETS_CACHE"):
        load_records("a/b", "calibration")


def test_problems_of_a_dataset_are_named_by_row(monkeypatch):
    import datasets

    rows = {"text": ["one", None]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(rows))
    assert problem("some/set") == "some/set, row 2: expected text to be a string; found None"


@pytest.mark.parametrize(("name", "count", "fields"), [("corpora/alpaca_small.json", 2000, {"prompt", "completion"})])
def test_real_alpaca_files_have_all_their_records(shared_data: Path, name, count, fields):
    records = load_records(str(shared_data / name))
    assert len(records) == count
    assert all(record.keys() == fields for record in records)
