"""Training examples: token ids, and the labels that the loss is computed on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spp.data.record_kinds import Record
from spp.data.tokens import cut, documents, encode, render, with_end
from spp.errors import UsageError

IGNORED = -100
"""Label of a token that the loss ignores, the same as in torch and transformers."""


@dataclass(frozen=True)
class Example:
    """A sequence to train on; `labels[i]` is `input_ids[i]` or IGNORED (the model shifts them)."""

    input_ids: list[int]
    labels: list[int]

    @property
    def teaches(self) -> bool:
        """Whether the loss has a token to predict; the first token is never predicted."""
        return self.predictions > 0

    @property
    def predictions(self) -> int:
        """How many tokens are predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


def whole_examples(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, completion_only: bool
) -> list[Example]:
    """One example of full length per record, with the end-of-text token where the tokenizer has one.

    Args:
        records: all of one kind.
        tokenizer: the model's. Nothing is added to messages: a chat template ends a conversation itself.
        completion_only: compute the loss on completions only, or on the assistant's messages only.

    Raises:
        UsageError: `completion_only` with plain text, or with a chat template that rewrites earlier messages.
    """
    ids = documents(records, tokenizer)
    if not any("messages" in record for record in records):
        ids = [with_end(one, tokenizer) for one in ids]
    if not completion_only:
        return [Example(one, one) for one in ids]
    if any("text" in record for record in records):
        raise UsageError(
            "--completion-only needs data with prompt and completion, instruction and output (Alpaca), or messages"
        )
    if any("messages" in record for record in records):
        return [_answers(record, one, tokenizer) for record, one in zip(records, ids, strict=True)]
    prompts = encode((record["prompt"] for record in records), tokenizer)
    return [_only(one, [(_shared(one, prompt), len(one))]) for one, prompt in zip(ids, prompts, strict=True)]


def _answers(record: Record, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Put the loss on the text that each of the assistant's messages adds to the conversation before it."""
    messages, text = record["messages"], render(record, tokenizer)
    prefixes: list[str] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < record.get("answers_from", 0):
            continue
        before = render({**record, "messages": messages[:index]}, tokenizer, answering=True) if index else ""
        after = render({**record, "messages": messages[: index + 1]}, tokenizer)
        if not (text.startswith(after) and after.startswith(before)):
            raise UsageError(
                f"--completion-only: the tokenizer's chat template writes message {index + 1} in another way when more "
                "messages follow, so that answers cannot be told from the rest; leave it out, or give data with prompt "
                "and completion"
            )
        prefixes += [before, after]
    ends = [_shared(ids, one) for one in encode(prefixes, tokenizer, special=False)]
    return _only(ids, list(zip(ends[::2], ends[1::2], strict=True)))


def _only(ids: list[int], learned: Iterable[tuple[int, int]]) -> Example:
    """An example with the loss on the ranges [start, end) of `learned` only."""
    labels = [IGNORED] * len(ids)
    for start, end in learned:
        labels[start:end] = ids[start:end]
    return Example(ids, labels)


def _shared(ids: list[int], beginning: list[int]) -> int:
    """How many leading tokens `ids` shares with `beginning`; a token may span the end of the beginning's text."""
    pairs = zip(ids, beginning, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(beginning)))


def truncate(examples: Sequence[Example], window: int) -> list[Example]:
    """Each example, cut after `window` tokens; examples without a token to predict are left out."""
    return _teaching(Example(one.input_ids[:window], one.labels[:window]) for one in examples)


def join(examples: Sequence[Example], window: int) -> list[Example]:
    """Examples joined and cut into windows of exactly `window` tokens.

    The incomplete last window is dropped unless it is the only one; so are windows without a token to predict.
    """
    ids, labels = (
        cut(list(chain.from_iterable(getattr(one, name) for one in examples)), window)
        for name in ("input_ids", "labels")
    )
    whole = [Example(list(a), list(b)) for a, b in zip(ids, labels, strict=True)]
    return _teaching(whole[:-1] if len(whole) > 1 and len(whole[-1].input_ids) < window else whole)


def _teaching(examples: Iterable[Example]) -> list[Example]:
    return [one for one in examples if one.teaches]


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch, padded on the right to its longest example: input_ids, attention_mask and labels, (N, T) int64."""
    length = max(len(one.input_ids) for one in examples)

    def padded(rows: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (length - len(row)) for row in rows])

    return {
        "input_ids": padded([one.input_ids for one in examples], 0),
        "attention_mask": padded([[1] * len(one.input_ids) for one in examples], 0),
        "labels": padded([one.labels for one in examples], IGNORED),
    }


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of token ids and labels, in order."""
    found = hashlib.sha256()
    for one in examples:
        found.update(json.dumps([one.input_ids, one.labels]).encode())
    return found.hexdigest()
