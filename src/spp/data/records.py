"""Text of every accepted kind, as a list of plain records.

A source is a file (.txt, .jsonl, .json, .parquet), `python-stdlib`, or a datasets id: `ID`, `ID:CONFIG` or
`ID:CONFIG:SPLIT` (the split is `train` unless named; `ID::SPLIT` names a split alone).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from spp.data.alpaca import alpaca_prompt
from spp.data.python_source import Part, standard_library
from spp.errors import UsageError, raise_problems

Record = dict[str, Any]
"""One of `{"text": str}`, `{"prompt": str, "completion": str}`, `{"messages": [{"role": str, "content": str}]}`."""

STANDARD_LIBRARY = "python-stdlib"

_FIELDS = frozenset({"text", "prompt", "completion", "instruction", "input", "output", "messages"})
_EXPECTED = "text, or prompt and completion, or instruction and output (Alpaca), or messages"
_SHOWN_PROBLEMS = 10
_DATASET_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[^:]*){0,2}")


class _Malformed(ValueError):
    """What is wrong with one record; the caller adds where it is."""


def load_records(source: str, part: Part = "train") -> list[Record]:
    """Read every record of a source, in order.

    Args:
        source: a file, a datasets id, or `python-stdlib`.
        part: which files of the standard library; other sources have no parts.

    Raises:
        UsageError: there is no such source, it holds nothing, or some of it is malformed: the message lists where
            (file and line), what was expected, and what was found.
    """
    if source == STANDARD_LIBRARY:
        return [{"text": text} for text in standard_library(part)]
    path = Path(source).expanduser()
    if path.is_file():
        records = _read_file(path)
    elif path.is_dir():
        raise UsageError(f"data {source!r} is a folder; give a file ({', '.join(_READERS)}) or a datasets id")
    elif path.suffix.lower() in _READERS or not _DATASET_ID.fullmatch(source):
        raise UsageError(f"data {source!r}: no such file")
    else:
        records = _normalise(_numbered(_read_dataset(source), "row"), source)
    if not any(map(_holds_text, records)):
        raise UsageError(f"data {source!r} is empty: there is no text in it")
    return records


def _holds_text(record: Record) -> bool:
    return any(value.strip() if isinstance(value, str) else value for value in record.values())


def _read_file(path: Path) -> list[Record]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"data {str(path)!r}: the suffix must be one of {', '.join(_READERS)}")
    return reader(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise UsageError(f"{path}, line {line}: expected UTF-8 text; found byte 0x{byte:02x}; convert it") from error


def _read_txt(path: Path) -> list[Record]:
    return [{"text": _read_text(path)}]


def _read_json(path: Path) -> list[Record]:
    """A JSON array of records, or JSON Lines; the content tells which, whatever the suffix says."""
    text = _read_text(path)
    if not text.lstrip().startswith("["):
        return _normalise(_json_lines(text), str(path))
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}, line {_line(error)}: expected a JSON array of records ({error})") from error
    return _normalise(_numbered(items, "item"), str(path))


def _json_lines(text: str) -> Iterator[tuple[str, Any]]:
    # Not str.splitlines: a JSON string may hold U+2028 and other separators that are no line ends here.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"line {number}", _Malformed(f"expected one JSON object per line ({error})")


def _line(error: Exception) -> int:
    return getattr(error, "lineno", 1)


def _read_parquet(path: Path) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        rows = file.read(columns=_known(file.schema_arrow.names)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error
    return _normalise(_numbered(rows, "row"), str(path))


def _read_dataset(source: str) -> Iterable[Any]:
    from datasets import load_dataset

    name, config, split = (source.split(":") + ["", ""])[:3]
    try:
        dataset = load_dataset(name, config or None, split=split or "train")
        return dataset.select_columns(_known(dataset.column_names))
    except Exception as error:  # network, hub, builder and file errors alike; the remedy is the same
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"data {source!r}: no such file, and not available as a dataset either ({reason}). Offline, give a file "
            f"({', '.join(_READERS)}), or load the dataset once where there is a network and copy the folder that "
            "HF_DATASETS_CACHE names. A datasets id is ID, ID:CONFIG or ID:CONFIG:SPLIT"
        ) from error


def _known(columns: list[str]) -> list[str]:
    """The columns that records are made of; all of them where there is none, for the error to name."""
    return [name for name in columns if name in _FIELDS] or columns


_READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _numbered(items: Iterable[Any], word: str) -> Iterator[tuple[str, Any]]:
    return ((f"{word} {number}", item) for number, item in enumerate(items, 1))


def _normalise(items: Iterable[tuple[str, Any]], source: str) -> list[Record]:
    """Check every item and bring it into one of the kinds of `Record`; all of one source must be of the same kind."""
    records: list[Record] = []
    problems: list[str] = []
    first = ""  # where the first good record is, and of which kind
    for where, item in items:
        try:
            record = _record(item)
        except _Malformed as error:
            problems.append(f"{source}, {where}: {error}")
            continue
        kind = " and ".join(record)
        first = first or f"{kind} in {where}"
        if not first.startswith(f"{kind} in "):
            problems.append(f"{source}, {where}: kinds are mixed: {kind} here, but {first}")
        records.append(record)
    if len(problems) > _SHOWN_PROBLEMS:
        shown = "\n".join(f"  - {problem}" for problem in problems[:_SHOWN_PROBLEMS])
        raise UsageError(f"{len(problems)} problems, the first {_SHOWN_PROBLEMS} of them:\n{shown}")
    raise_problems(problems)
    if not records:
        raise UsageError(f"data {source!r} is empty: there is no record in it")
    return records


def _record(item: Any) -> Record:
    if isinstance(item, _Malformed):
        raise item
    if not isinstance(item, dict):
        raise _Malformed(f"expected an object with {_EXPECTED}; found {_show(item)}")
    if {"instruction", "output"} <= item.keys():  # some Alpaca sets bring the rendered `text` along
        prompt = alpaca_prompt(_string(item, "instruction"), _string(item, "input", optional=True))
        return {"prompt": prompt, "completion": _string(item, "output")}
    kinds = [kind for kind in (("text",), ("prompt", "completion"), ("messages",)) if item.keys() >= set(kind)]
    if len(kinds) != 1:
        found = ", ".join(map(str, item)) or "no field"
        several = " of one kind only" if kinds else ""
        raise _Malformed(f"expected {_EXPECTED}{several}; found {found}")
    if kinds[0] == ("messages",):
        return {"messages": _messages(item["messages"])}
    return {name: _string(item, name) for name in kinds[0]}


def _string(item: dict[str, Any], name: str, *, optional: bool = False) -> str:
    value = item.get(name)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise _Malformed(f"expected {name} to be a string; found {_show(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _Malformed(
            f"{name} holds half of a surrogate pair at character {error.start}, which is no text"
        ) from None
    return value


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _Malformed(f"expected messages to be a list of objects with role and content; found {_show(value)}")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise _Malformed(f"expected every message to have role and content; found {_show(message)}")
    return [{name: _string(message, name) for name in ("role", "content")} for message in value]


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
