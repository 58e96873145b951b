"""Records as token ids: whole documents, and windows cut from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from spp.data.record_kinds import Record
from spp.errors import UsageError

_AT_ONCE = 1000  # texts per call: the tokenizer's own threads are busy, and memory stays small


def render(record: Record, tokenizer: PreTrainedTokenizerBase, *, answering: bool = False) -> str:
    """A record as one text: prompt and completion joined, messages through the tokenizer's chat template.

    Args:
        record: a record of any kind.
        tokenizer: the model's.
        answering: end with the template's prompt for the assistant's next message.

    Raises:
        UsageError: there are messages, and the tokenizer has no chat template, or one that refuses them.
    """
    if "messages" not in record:
        return "".join(record.values())
    if not tokenizer.chat_template:
        raise UsageError(
            "the data has messages, but the model's tokenizer has no chat template; "
            "give data with text, or prompt and completion"
        )
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise UsageError(
            f"the data has messages, and of the tokenizer's chat templates ({', '.join(tokenizer.chat_template)}) none "
            "is called default; copy the one to use to chat_template.jinja in the model's folder"
        )
    try:
        text = tokenizer.apply_chat_template(
            record["messages"], tools=record.get("tools"), tokenize=False, add_generation_prompt=answering
        )
    except (TemplateError, TypeError, ValueError) as error:  # what a template does may fail in any way
        roles = ", ".join(message["role"] for message in record["messages"])
        raise UsageError(f"the tokenizer's chat template refuses messages with the roles {roles}: {error}") from error
    assert isinstance(text, str)
    return text


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, special: bool = True) -> list[list[int]]:
    """Token ids of every text, with the special tokens that the tokenizer adds unless `special` is off."""
    rest = iter(texts)
    ids: list[list[int]] = []
    while some := list(islice(rest, _AT_ONCE)):
        ids += tokenizer(some, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]  # pyright: ignore[reportOperatorIssue]
    return ids


def documents(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, special: bool = True
) -> list[list[int]]:
    """Token ids of each record; a chat template writes the special tokens itself, else the tokenizer if `special`."""
    special = special and not any("messages" in record for record in records)
    return encode((render(record, tokenizer) for record in records), tokenizer, special=special)


def join(pieces: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The documents concatenated, with the end-of-text token after each if the tokenizer has one."""
    return list(chain.from_iterable(with_end(piece, tokenizer) for piece in pieces))


def with_end(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with the end-of-text token at their end, if the tokenizer has one."""
    end: Any = tokenizer.eos_token_id
    return list(ids) if end is None or (ids and ids[-1] == end) else [*ids, end]


def cut(ids: Sequence[int], window: int) -> list[Sequence[int]]:
    """Consecutive windows without overlap; the last one may be shorter."""
    return [ids[start : start + window] for start in range(0, len(ids), window)]


def require_known_ids(sequences: Iterable[Sequence[int]], vocabulary: int, what: str) -> None:
    """Raise a UsageError if a sequence, none of which is empty, has a token id beyond the model's vocabulary."""
    if (largest := max(map(max, sequences))) >= vocabulary:
        raise UsageError(
            f"the {what} holds the token id {largest}, but the model knows {vocabulary} tokens; the tokenizer belongs "
            "to another model"
        )
