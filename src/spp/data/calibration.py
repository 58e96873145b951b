"""Windows of text that pruning statistics are taken from."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spp.data.records import load_records
from spp.data.tokens import cut, documents, join
from spp.errors import UsageError

logger = logging.getLogger("spp")

_TOKENISED_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration windows and what it takes to know them again.

    Attributes:
        windows: (samples, window) token ids, int64.
        source: the file, datasets id, or `python-stdlib`.
        sha256: of the ids as little-endian 64-bit integers, row by row.
        kind: how the windows were made.
    """

    windows: Tensor
    source: str
    sha256: str
    kind: str


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, source: str, *, samples: int, window: int, seed: int
) -> Calibration:
    """Draw windows as the published protocol does: one at a random place of each of `samples` documents.

    Only documents longer than the window take part. Where there are too few of them, all documents are joined in
    random order and cut into windows instead, and `kind` says so. The same arguments give the same windows.

    Args:
        tokenizer: the model's.
        source: what `load_records` reads; of the standard library its calibration part.
        samples: windows wanted; there are fewer, and a warning, where the text is too short for so many.
        window: tokens per window.
        seed: of the choice of documents and places.

    Raises:
        UsageError: the source cannot be read, or all of its text is shorter than one window.
    """
    records = load_records(source, "calibration")
    chance = random.Random(seed)
    chance.shuffle(records)
    windows, kind = _from_long_documents(records, tokenizer, samples, window, chance)
    if len(windows) < samples:
        windows, kind = _from_joined_documents(records, tokenizer, samples, window, chance)
    if not windows:
        raise UsageError(f"calibration text {source!r} has fewer tokens than one window of {window}; pass --window")
    if len(windows) < samples:
        logger.warning("%s has only %d calibration windows of %d tokens, not %d", source, len(windows), window, samples)
    tensor = torch.tensor(windows, dtype=torch.int64)
    digest = hashlib.sha256(tensor.numpy().astype("<i8").tobytes()).hexdigest()
    return Calibration(windows=tensor, source=source, sha256=digest, kind=kind)


def _from_long_documents(
    records: list[dict], tokenizer: PreTrainedTokenizerBase, samples: int, window: int, chance: random.Random
) -> tuple[list[Sequence[int]], str]:
    windows: list[Sequence[int]] = []
    for first in range(0, len(records), _TOKENISED_AT_ONCE):
        for ids in documents(records[first : first + _TOKENISED_AT_ONCE], tokenizer):
            if len(ids) > window:
                start = chance.randint(0, len(ids) - window)
                windows.append(ids[start : start + window])
        if len(windows) >= samples:  # a large corpus is not tokenised to its end
            break
    return windows[:samples], "a random window of each document longer than the window"


def _from_joined_documents(
    records: list[dict], tokenizer: PreTrainedTokenizerBase, samples: int, window: int, chance: random.Random
) -> tuple[list[Sequence[int]], str]:
    whole = [ids for ids in cut(join(documents(records, tokenizer), tokenizer), window) if len(ids) == window]
    return chance.sample(whole, min(samples, len(whole))), "windows cut from joined documents"
