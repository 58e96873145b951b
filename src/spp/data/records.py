"""Text of every accepted kind, as a list of plain records.

A source is a file (.txt, .jsonl, .json, all of them also as .gz, and .parquet), `python-stdlib`, or a datasets id:
`ID`, `ID:CONFIG` or `ID:CONFIG:SPLIT` (the split is `train` unless named; `ID::SPLIT` names only a split, and
`ID:CONFIG:train[:1%]` a part of it).

What a record is depends on the source: a row of wikitext on the hub is one line, and many are empty. Calibration
ignores empty records and joins short ones.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from spp.data.python_source import Part, standard_library
from spp.data.record_kinds import FIELDS, Malformed, Record, holds_text, kind_of, record_of
from spp.errors import UsageError, brief, raise_problems
from spp.runtime.files import user_path

Columns = Mapping[str, str]
"""Field of a record -> the name that it has in a table; empty for tables with the names that are known."""

_Rows = Callable[[str, str | None, str, Columns], Iterable[Any]]
"""A function that reads a dataset, given its id, configuration, split and columns."""

STANDARD_LIBRARY = "python-stdlib"

_SHOWN_PROBLEMS = 10
_CHECKED_AFTER_A_PROBLEM = 100_000
# Name, configuration and split; a slice, in brackets, may hold a colon.
_DATASET_ID = re.compile(r"(\w[\w.-]*(?:/\w[\w.-]*)?)" + 2 * r"(?::((?:[^:\[\]]|\[[^\[\]]*\])*))?")
# Rows of a dataset that calibration reads: a dataset may have hundreds of gigabytes. One in forty of C4's documents is
# longer than 2,048 tokens, so this many rows hold three times the 128 windows of the papers.
_STREAMED_ROWS = 16_384
_STREAMED_CHARACTERS = 200_000_000  # the limit where rows are books


def load_records(source: str, part: Part = "train", columns: Columns | None = None) -> list[Record]:
    """Read every record of a source, in order.

    Args:
        source: a file, a datasets id, or `python-stdlib`.
        part: which files of the standard library to read. Other sources have no parts, but of a dataset for
            `calibration` only the first 16,384 rows are read, as a stream, unless its split is a slice.
        columns: see `Columns`.

    Raises:
        UsageError: there is no such source, it is empty, or records are malformed: the message lists where (file and
            line), what was expected, and what was found.
    """
    return list(
        _with_text(_records(source, part, _first_rows if part == "calibration" else _all_rows, columns), source)
    )


def stream_records(source: str, columns: Columns | None = None) -> Iterator[Record]:
    """The records of a training source, each read on demand, so that the source may be larger than memory.

    That holds for JSON Lines, Parquet files and datasets ids; other files are read whole.

    Raises:
        UsageError: as `load_records`, when reading reaches the problem.
    """
    return _with_text(_records(source, "train", _stream, columns), source)


def _with_text(records: Iterator[Record], source: str) -> Iterator[Record]:
    """The records; at their end, an error if none of them holds text. So what reads a part of them reads up to text."""
    blank: list[Record] = []
    for record in records:
        blank.append(record)
        if holds_text(record):
            break
    else:
        raise UsageError(f"data {source!r} is empty: there is no text in it")
    yield from blank
    yield from records


def _records(source: str, part: Part, rows: _Rows, columns: Columns | None) -> Iterator[Record]:
    """The records of a source; a datasets id is read by `rows`."""
    path, columns = user_path(source), columns or {}
    if source == STANDARD_LIBRARY:
        yield from ({"text": text} for text in standard_library(part))
    elif path.is_file():
        yield from _read_file(path, columns)
    elif path.is_dir():
        raise UsageError(f"data {source!r} is a folder; give a file ({', '.join(_READERS)}) or a datasets id")
    elif data_suffix(path) in _READERS or not _DATASET_ID.fullmatch(source):
        raise UsageError(f"data {source!r}: no such file")
    else:
        yield from _normalize(_numbered(_read_dataset(source, rows, columns), "row"), source, columns)


def data_suffix(path: Path) -> str:
    """The suffix of a file's name, by which it is read, in lower case: `.jsonl`, `.json.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def _read_file(path: Path, columns: Columns) -> Iterator[Record]:
    reader = _READERS.get(data_suffix(path))
    if reader is None:
        raise UsageError(f"data {str(path)!r}: the suffix must be one of {', '.join(_READERS)}")
    return reader(path, columns)


@contextmanager
def open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """Context manager for a text file, decompressed if its name ends in .gz; damaged bytes raise a UsageError."""
    try:
        with _binary(path) as binary, io.TextIOWrapper(cast(Any, binary), encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}, {_first_undecodable(path)}; convert it") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UsageError(
            f"{path}: not a whole gzip file ({error}); it is truncated, damaged, or not compressed at all: "
            "copy or download it again, or rename it without .gz"
        ) from error


def _binary(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _first_undecodable(path: Path) -> str:
    """The line that is not UTF-8. The file is read again: a decoder only knows positions in its own buffer."""
    with _binary(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}: expected UTF-8 text; found byte 0x{line[error.start]:02x}"
    raise AssertionError("a file that is not UTF-8 as a whole is so line by line")


def _read_txt(path: Path, columns: Columns) -> Iterator[Record]:
    with open_text(path) as file:
        yield {"text": file.read()}


def _read_json(path: Path, columns: Columns) -> Iterator[Record]:
    """A JSON array of records, or JSON Lines; the content decides which, not the suffix."""
    with open_text(path) as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        if not first.lstrip().startswith("["):
            yield from _normalize(json_lines(file), str(path), columns)
            return
        text = file.read()
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}, line {_line(error)}: expected a JSON array of records ({error})") from error
    yield from _normalize(_numbered(items, "item"), str(path), columns)


def json_lines(lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The position (`line 3`) and value of each line; for a line that is not JSON, a `Malformed` instead."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"line {number}", Malformed(f"expected one JSON object per line ({error})")


def _line(error: Exception) -> int:
    return getattr(error, "lineno", 1)


def _read_parquet(path: Path, columns: Columns) -> Iterator[Record]:
    import pyarrow.parquet

    def rows() -> Iterator[Any]:
        try:
            file = pyarrow.parquet.ParquetFile(path)
            for batch in file.iter_batches(columns=_known(file.schema_arrow.names, columns)):
                yield from batch.to_pylist()
        except Exception as error:  # a damaged file raises whatever its parts do
            raise UsageError(f"{path}: not a readable parquet file ({brief(error)})") from error

    yield from _normalize(_numbered(rows(), "row"), str(path), columns)


def _read_dataset(source: str, rows: _Rows, columns: Columns) -> Iterator[Any]:
    found = _DATASET_ID.fullmatch(source)
    assert found, source
    name, config, split = found[1], found[2] or None, found[3] or "train"
    if config and "[" in config:
        raise UsageError(f"data {source!r}: a slice is of a split; write {name}::{config}, or {name}:CONFIG:{config}")
    try:
        yield from (_all_rows if "[" in split else rows)(name, config, split, columns)  # a stream has no slices
    except Exception as error:  # network, hub, builder and file errors alike; the remedy is the same
        raise UsageError(
            f"data {source!r}: no such file, and not available as a dataset ({brief(error)}). Without a network, "
            f"give a file ({', '.join(_READERS)}), or load the dataset once where there is one, copy the folder "
            "that HF_DATASETS_CACHE names, and set HF_HUB_OFFLINE=1. A datasets id is ID, ID:CONFIG or ID:CONFIG:SPLIT"
        ) from error


def _all_rows(name: str, config: str | None, split: str, columns: Columns) -> Iterable[Any]:
    from datasets import load_dataset

    dataset = load_dataset(name, config, split=split)
    return dataset.select_columns(_known(dataset.column_names, columns))


def _stream(name: str, config: str | None, split: str, columns: Columns) -> Iterable[Any]:
    from datasets import load_dataset

    dataset = load_dataset(name, config, split=split, streaming=True)
    # A stream does not always know its columns.
    return dataset.select_columns(_known(dataset.column_names, columns)) if dataset.column_names else dataset


def _first_rows(name: str, config: str | None, split: str, columns: Columns) -> Iterator[Any]:
    """The first rows of a dataset, without downloading the rest of it."""
    characters = 0
    for row in islice(_stream(name, config, split, columns), _STREAMED_ROWS):
        yield row
        characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if characters >= _STREAMED_CHARACTERS:
            break


def _known(names: list[str], columns: Columns) -> list[str]:
    """The columns that records are made of; if there are none, all columns, which the error then names."""
    chosen = [name for name in names if name in columns.values()]
    return chosen or [name for name in names if name in FIELDS] or names


_READERS: dict[str, Callable[[Path, Columns], Iterator[Record]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt.gz": _read_txt,
    ".jsonl.gz": _read_json,
    ".json.gz": _read_json,
}


def _numbered(items: Iterable[Any], word: str) -> Iterator[tuple[str, Any]]:
    return ((f"{word} {number}", item) for number, item in enumerate(items, 1))


def _normalize(items: Iterable[tuple[str, Any]], source: str, columns: Columns) -> Iterator[Record]:
    """Turn every item into a `Record`; all items of a source must be of one kind.

    After the first problem no more records are yielded. Further items are only checked, a limited number of them, so
    that problems are reported together.
    """
    problems: list[str] = []
    first = ""  # kind and position of the first good record
    checked, at_least = 0, ""
    for where, item in items:
        checked += bool(problems)
        if checked > _CHECKED_AFTER_A_PROBLEM:
            at_least = "at least "
            break
        try:
            record = record_of(item, columns)
        except Malformed as error:
            problems.append(f"{source}, {where}: {error}")
            continue
        kind = kind_of(record)
        first = first or f"{kind} in {where}"
        if not first.startswith(f"{kind} in "):
            problems.append(f"{source}, {where}: kinds are mixed: {kind} here, but {first}")
        if not problems:
            yield record
    raise_first_problems(problems, at_least)
    if not first:
        raise UsageError(f"data {source!r} is empty: there is no record in it")


def raise_first_problems(problems: list[str], at_least: str = "") -> None:
    """Raise a UsageError that lists the problems, at most the first few; do nothing if there are none."""
    if len(problems) > _SHOWN_PROBLEMS:
        shown = "\n".join(f"  - {problem}" for problem in problems[:_SHOWN_PROBLEMS])
        raise UsageError(f"{at_least}{len(problems)} problems, the first {_SHOWN_PROBLEMS} of them:\n{shown}")
    raise_problems(problems)
