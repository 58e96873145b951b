"""One row of a table as a record: text, prompt and completion, or a conversation, whatever its fields are called.

A conversation may have any of these forms: `messages` with role and content; ShareGPT's `conversations` with from and
value; TRL's prompt and completion, each a list of messages. Content may be a string, or a list of parts of text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from spp.data.alpaca import alpaca_prompt
from spp.errors import shown

Record = dict[str, Any]
"""One of `{"text": str}`, `{"prompt": str, "completion": str}`, `{"messages": [{"role": str, "content": str, ...}]}`.

Messages may have `tool_calls`, `tool_call_id` and `name`; beside them may stand `tools`, a list of functions that the
chat template describes, and `answers_from`, the index of the first message that is an answer to learn.
"""

FIELDS = frozenset(
    {"text", "prompt", "completion", "instruction", "input", "output", "messages", "conversations", "system", "tools"}
)
"""Fields of a row that records are made of."""

_EXPECTED = (
    "text, or prompt and completion, or instruction and output (Alpaca), or messages, or conversations (ShareGPT)"
)
_KINDS = (("text",), ("prompt", "completion"), ("messages",), ("conversations",))
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool"}
"""ShareGPT's names of roles -> those of chat templates; others are the same."""


class Malformed(ValueError):
    """One record is malformed; the message says how, and the caller adds its position."""


def kind_of(record: Record) -> str:
    """Which of the three kinds a record is, in words."""
    return next(" and ".join(kind) for kind in _KINDS if record.keys() >= set(kind))


def holds_text(record: Record) -> bool:
    """Whether a record holds more than white space."""
    if "messages" in record:
        return any(message["content"].strip() or message.get("tool_calls") for message in record["messages"])
    return any(value.strip() for value in record.values())


def record_of(item: Any, columns: Mapping[str, str]) -> Record:
    """A row as a record.

    Args:
        item: the row; its other fields are ignored.
        columns: field of a record -> name that it has in the row. A row that has none of these names is taken as it is.

    Raises:
        Malformed: it is no object, or does not have the fields of exactly one kind.
    """
    if isinstance(item, Malformed):
        raise item
    if not isinstance(item, dict):
        raise Malformed(f"expected an object with {_EXPECTED}; found {shown(item)}")
    if columns and any(name in item for name in columns.values()):
        if lacking := [name for name in columns.values() if name not in item]:
            raise Malformed(f"columns names {', '.join(lacking)}, which is not there; found {_names(item)}")
        item = {field: item[name] for field, name in columns.items()}
    if {"instruction", "output"} <= item.keys():  # some Alpaca sets also have the rendered `text`
        prompt = alpaca_prompt(_string(item, "instruction"), _string(item, "input", optional=True))
        return {"prompt": prompt, "completion": _string(item, "output")}
    kinds = [kind for kind in _KINDS if item.keys() >= set(kind)]
    if len(kinds) != 1:
        several = " of one kind only" if kinds else ""
        remedy = "" if kinds else "; --columns names them, as in --columns prompt=question,completion=answer"
        raise Malformed(f"expected {_EXPECTED}{several}; found {_names(item)}{remedy}")
    if kinds[0] in (("messages",), ("conversations",)):
        return _conversation(item, _messages(item[kinds[0][0]], kinds[0][0]))
    if isinstance(item.get("prompt"), list) and isinstance(item.get("completion"), list):
        prompt, completion = (_messages(item[name], name) for name in ("prompt", "completion"))
        return {**_conversation(item, prompt + completion), "answers_from": len(prompt)}
    return {name: _string(item, name) for name in kinds[0]}


def _names(item: Mapping[Any, Any]) -> str:
    found = ", ".join(map(str, item)) or "no field"
    return found if len(found) <= 200 else f"{found[:200]}..."


def _string(item: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
    value = item.get(name)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise Malformed(f"expected {name} to be a string; found {shown(value)}")
    return _text(value, name)


def _text(value: str, name: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"{name} holds half of a surrogate pair at character {error.start}, which is no text") from None
    return value


def _conversation(item: Mapping[str, Any], messages: list[dict[str, Any]]) -> Record:
    """The record of a conversation; ShareGPT has the system's message in a field of its own."""
    system = item.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text(system, "system")}, *messages]
    tools = _tools(item.get("tools"))
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def _tools(value: Any) -> list[Any]:
    if isinstance(value, str) and value.strip():  # tables have them as JSON, because their types differ
        value = _json(value, "tools")
    if value and not (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
        raise Malformed(f"expected tools to be a list of objects; found {shown(value)}")
    return _encodable(value or [], "tools")


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise Malformed(f"expected {field} to be a list of objects with role and content; found {shown(value)}")
    return [_message(message) for message in value]


def _message(message: Any) -> dict[str, Any]:
    """A message; of what else it holds, only calls of tools and the results of tools are kept."""
    if isinstance(message, dict) and {"from", "value"} <= message.keys():
        role = _string(message, "from")
        message = {**message, "role": _ROLES.get(role, role), "content": message["value"]}
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(message, dict) or "role" not in message or ("content" not in message and not calls):
        raise Malformed(f"expected every message to have role and content; found {shown(message)}")
    role, content = _string(message, "role"), message.get("content")
    found: dict[str, Any] = {"role": role, "content": "" if content is None and calls else _content(content)}
    if calls:
        found["tool_calls"] = _tool_calls(calls)
    names = ("name", "tool_call_id") if role == "tool" else ()
    return found | {name: _string(message, name) for name in names if message.get(name) is not None}


def _content(content: Any) -> str:
    """A message's text; its parts, where it has several, are joined."""
    if not isinstance(content, list):
        return _string({"content": content}, "content")
    texts = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise Malformed(f"expected content to have parts of text only; found {shown(part)}")
        texts.append(_text(part["text"], "content"))
    return "".join(texts)


def _tool_calls(calls: Any) -> list[Any]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Malformed(f"expected tool_calls to be a list of objects; found {shown(calls)}")
    return [_with_parsed_arguments(call) for call in _encodable(calls, "tool_calls")]


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A call with its arguments as an object, which templates expect; APIs give them as JSON."""
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": _with_parsed_arguments(inner)}
    arguments = call.get("arguments")
    return {**call, "arguments": _json(arguments, "arguments")} if isinstance(arguments, str) else call


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"expected {name} to be JSON ({error}); found {shown(text)}") from None


def _encodable(value: Any, name: str) -> Any:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise Malformed(f"expected {name} to be JSON values ({error}); found {shown(value)}") from None
    return value
