"""Windows of text that pruning statistics are taken from.

Reading and tokenizing a corpus can take longer than pruning with it, so the windows are stored in the user's cache (see
`spp.data.cache`), under a hash of everything that they depend on.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spp._version import __version__
from spp.data.cache import cache_name, read_entry, write_entry
from spp.data.record_kinds import Record, holds_text
from spp.data.records import STANDARD_LIBRARY, data_suffix, load_records
from spp.data.tokens import cut, documents, join
from spp.errors import UsageError
from spp.runtime.files import user_path

logger = logging.getLogger("spp")

_TOKENIZED_AT_ONCE = 256
_ALGORITHM = 1  # raise it when other windows are drawn, so that old entries of the cache are not used


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration windows, and what identifies them.

    Attributes:
        windows: (samples, window) token ids, int64.
        source: the file, datasets id, or `python-stdlib`.
        sha256: of the ids as little-endian 64-bit integers, row by row.
        kind: a phrase that says which documents the windows come from.
    """

    windows: Tensor
    source: str
    sha256: str
    kind: str


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    samples: int,
    window: int,
    seed: int,
    columns: Mapping[str, str] | None = None,
) -> Calibration:
    """Draw windows as the published protocol does: one at a random place in each of `samples` documents.

    Only documents longer than the window are used. If there are too few, the remaining windows are cut from the shorter
    documents, joined in random order. If that is not enough either, as for a single book, all windows are cut from all
    documents, joined. `kind` says how many windows came from where. The same arguments give the same windows; windows
    that were drawn before come from the cache.

    Args:
        tokenizer: the model's.
        source: what `load_records` reads; of the standard library, its calibration part. Blank records are ignored.
        samples: number of windows; there are fewer, and a warning, if the text is too short.
        window: tokens per window.
        seed: seed of the choice of documents and places.
        columns: field of a record -> the name that it has in the source.

    Raises:
        UsageError: the source cannot be read, or all of its text is shorter than one window.
    """
    text = _Text(source, columns or {})
    name = _cache_name(tokenizer, text, samples, window, seed)
    windows, kind = _kept(name) or _drawn(name, text, tokenizer, samples, window, random.Random(seed))
    if len(windows) < samples:
        logger.warning("%s has only %d calibration windows of %d tokens, not %d", source, len(windows), window, samples)
    return Calibration(windows=windows, source=source, sha256=_sha256(windows), kind=kind)


class _Text:
    """The records of a source, read when they are first needed, and the facts that identify them."""

    def __init__(self, source: str, columns: Mapping[str, str]) -> None:
        self.source, self._columns = source, columns

    @cached_property
    def records(self) -> list[Record]:
        return [record for record in load_records(self.source, "calibration", self._columns) if holds_text(record)]

    @property
    def facts(self) -> list[Any]:
        """For a file its suffix, by which it is read, and its hash; for any other source the records themselves."""
        path = user_path(self.source)
        if self.source == STANDARD_LIBRARY or not path.is_file():
            return [self.records]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [data_suffix(path), digest, *([dict(self._columns)] if self._columns else [])]


def _cache_name(tokenizer: PreTrainedTokenizerBase, text: _Text, samples: int, window: int, seed: int) -> str | None:
    """The cache entry of these windows; None for a tokenizer written in Python, whose code cannot be hashed."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not tokenizer.is_fast or backend is None:
        return None
    tokenizer_facts = [
        type(tokenizer).__name__,
        backend.to_str(),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.eos_token_id,
        getattr(tokenizer, "split_special_tokens", False),
    ]
    versions = [_ALGORITHM, __version__, tokenizers.__version__, transformers.__version__]
    return cache_name("calibration", [text.facts, tokenizer_facts, samples, window, seed, versions])


def _kept(name: str | None) -> tuple[Tensor, str] | None:
    """Windows and their kind from the cache."""
    if name is None or (entry := read_entry(name)) is None:
        return None
    tensors, facts = entry
    if tensors.keys() != {"windows"} or facts.get("sha256") != _sha256(tensors["windows"]) or "kind" not in facts:
        logger.info("the cached %s is damaged and is made again", name)
        return None
    logger.debug("the calibration windows are those of %s in the cache", name)
    return tensors["windows"], facts["kind"]


def _drawn(
    name: str | None, text: _Text, tokenizer: PreTrainedTokenizerBase, samples: int, window: int, chance: random.Random
) -> tuple[Tensor, str]:
    """Windows and their kind from the text; they are stored in the cache."""
    rows, kind = _draw(text.records, tokenizer, samples, window, chance)
    if not rows:
        raise UsageError(
            f"calibration text {text.source!r} has fewer tokens than one window of {window}; pass a smaller --window, "
            "or give more text"
        )
    windows = torch.tensor(rows, dtype=torch.int64)
    if name is not None:
        write_entry(name, {"windows": windows}, {"kind": kind, "sha256": _sha256(windows)})
    return windows, kind


def _sha256(windows: Tensor) -> str:
    return hashlib.sha256(windows.numpy().astype("<i8").tobytes()).hexdigest()


def _draw(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, samples: int, window: int, chance: random.Random
) -> tuple[list[Sequence[int]], str]:
    """Up to `samples` windows, and their kind (see `Calibration`)."""
    shuffled = list(records)
    chance.shuffle(shuffled)
    places: list[Sequence[int]] = []
    short: list[Sequence[int]] = []
    spare = samples * window  # more tokens of short documents than this are never needed
    for ids in _tokenized(shuffled, tokenizer):
        if len(ids) > window:
            start = chance.randint(0, len(ids) - window)
            places.append(ids[start : start + window])
        elif spare > 0:
            short.append(ids)
            spare -= len(ids)
        if len(places) == samples:  # a large corpus is not tokenized to its end
            return places, "a random window of each document longer than the window"
    packed = _packed(short, tokenizer, samples - len(places), window, chance)
    if len(places) + len(packed) < samples:  # then cut all windows from all documents
        packed, places = _packed(documents(shuffled, tokenizer), tokenizer, samples, window, chance), []
    return places + packed, _kind(len(places), len(packed), len(records))


def _tokenized(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    for first in range(0, len(records), _TOKENIZED_AT_ONCE):
        yield from documents(records[first : first + _TOKENIZED_AT_ONCE], tokenizer)


def _packed(
    pieces: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, count: int, window: int, chance: random.Random
) -> list[Sequence[int]]:
    """Up to `count` windows, drawn at random from the documents joined and cut."""
    whole = [ids for ids in cut(join(pieces, tokenizer), window) if len(ids) == window]
    return chance.sample(whole, min(count, len(whole)))


def _kind(places: int, packed: int, records: int) -> str:
    if places:
        return f"{_windows(places)} of documents longer than the window, {packed} of packed shorter ones"
    return "windows cut from one document" if records == 1 else "windows of packed documents"


def _windows(count: int) -> str:
    return f"{count} window{'s' if count != 1 else ''}"
