"""What a training run is trained on."""

from __future__ import annotations

import logging

from spp.data.examples import Example, pack, truncate, whole_examples
from spp.data.records import load_records
from spp.data.tokens import require_known_ids
from spp.errors import UsageError
from spp.loading import load_tokenizer
from spp.options import CacheTeacherOptions, TrainOptions

logger = logging.getLogger("spp")


def training_examples(
    options: TrainOptions | CacheTeacherOptions, window: int, vocabulary: int
) -> tuple[list[Example], bool]:
    """What to train on, and whether documents were packed into full windows."""
    tokenizer = load_tokenizer(options.model, options)
    records = load_records(options.data, "train")
    whole = whole_examples(records, tokenizer, completion_only=options.completion_only)
    packing = options.packing
    if packing is None:
        packing = sum(len(one.input_ids) for one in whole) > window * len(whole)
    examples = pack(whole, window) if packing else truncate(whole, window)
    if not examples:
        raise UsageError(f"data {options.data!r} has no example with a token to predict within {window} tokens")
    require_known_ids((one.input_ids for one in examples), vocabulary, "data")
    how = "packed documents" if packing else "one document each"
    logger.info("training on %d sequences of up to %d tokens (%s) from %s", len(examples), window, how, options.data)
    return examples, packing
