"""The examples of a training run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from spp.data.examples import Example, join, truncate, whole_examples
from spp.data.records import load_records, stream_records
from spp.data.tokens import require_known_ids
from spp.errors import UsageError
from spp.models.loading import load_tokenizer
from spp.training.options import CacheTeacherOptions, TrainOptions

logger = logging.getLogger("spp")

ExampleSource = TrainOptions | CacheTeacherOptions
_READ_AT_ONCE = 1000


def training_examples(options: ExampleSource, folder: Path, window: int, vocabulary: int) -> tuple[list[Example], bool]:
    """The training examples for the model in `folder`, and whether documents were joined and cut into windows."""
    tokenizer = load_tokenizer(folder, options)
    whole = _whole_documents(options, tokenizer)
    joined = options.join_documents
    if joined is None:
        joined = sum(len(one.input_ids) for one in whole) > window * len(whole)
    examples = join(whole, window) if joined else truncate(whole, window)
    if not examples:
        raise UsageError(f"data {options.data!r} has no example with a token to predict within {window} tokens")
    require_known_ids((one.input_ids for one in examples), vocabulary, "data")
    how = "joined documents" if joined else "one document each"
    logger.info("training on %d sequences of up to %d tokens (%s) from %s", len(examples), window, how, options.data)
    return examples, joined


def _whole_documents(options: ExampleSource, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Every document in full length; with `max_tokens`, only the first ones, with that many tokens in total."""
    if options.max_tokens is None:
        return whole_examples(
            load_records(options.data, columns=options.column_names), tokenizer, completion_only=options.completion_only
        )
    examples: list[Example] = []
    left, stream = options.max_tokens, stream_records(options.data, options.column_names)
    while left > 0 and (some := list(islice(stream, _READ_AT_ONCE))):
        for one in whole_examples(some, tokenizer, completion_only=options.completion_only):
            examples += truncate([one], left)
            left -= min(len(one.input_ids), left)
    return examples


def hold_out(examples: Sequence[Example], options: TrainOptions) -> tuple[list[tuple[int, Example]], list[Example]]:
    """Examples to train on, with their indices in the data, and random examples to evaluate on (`seed`).

    Raises:
        UsageError: nothing would be left to train on.
    """
    count = options.held_out
    if count >= len(examples):
        raise UsageError(f"validation {count} would leave nothing of {len(examples)} examples to train on; lower it")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(options.seed))
    held = set(order[:count].tolist())
    training = [(number, one) for number, one in enumerate(examples) if number not in held]
    return training, [examples[number] for number in sorted(held)]
