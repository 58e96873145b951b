"""Perplexity, in the two protocols of published figures.

Windows: documents are joined with a blank line, tokenized once and cut into windows that do not overlap; the incomplete
tail is dropped (the protocol of Wanda and SparseGPT). Per document: each document is scored by itself, cut if it is
longer than the window; tails count. In both, the first token of a window is context only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spp.data.record_kinds import Record
from spp.data.records import STANDARD_LIBRARY, data_suffix, load_records
from spp.data.tokens import cut, documents, encode, render, require_known_ids
from spp.errors import SppError, UsageError
from spp.evaluation.options import EvalOptions
from spp.models.loading import context_window, load_config, load_tokenizer
from spp.runtime.progress import track

# Logits are the largest tensor by far. These bound a batch of them (1 GiB in fp32), and the fp32 copy of some rows.
_LOGITS_AT_ONCE = 2**28
_LOG_SOFTMAX_AT_ONCE = 2**25
_TOKENS_AT_ONCE = 2**13

EACH_WINDOW, NOWHERE, BY_TOKENIZER = "in each window", "nowhere", "as the tokenizer adds it"
"""Which windows begin with the beginning-of-text token."""

_NEED_BOS = ("gemma", "recurrent_gemma")  # model types whose predictions are far off in a window without it


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood summed over tokens, in nats, and the number of predicted tokens."""

    total: float
    tokens: int

    @property
    def nll(self) -> float:
        """Nats per token."""
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite where that overflows."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class Windows:
    """Text as it is scored.

    Attributes:
        windows: token ids; each window is scored by itself.
        window: most tokens in a window.
        documents: number of records read.
        per_document: which protocol (see the top of this file).
        bos: which windows begin with the beginning-of-text token: `in each window`,
            `nowhere`, or `as the tokenizer adds it`.
    """

    windows: list[Sequence[int]]
    window: int
    documents: int
    per_document: bool
    bos: str


def read_windows(options: EvalOptions, model: Path) -> Windows:
    """The evaluation text of `options`, tokenized and cut for the model in the folder `model`.

    Raises:
        UsageError: a missing model or text, or too little text for one window.
    """
    config = load_config(model, options)
    window = context_window(config, options.window)
    tokenizer = load_tokenizer(model, options)
    records = load_records(options.text, "evaluation", options.column_names)[: options.limit]
    per_document = _is_by_document(options.text) if options.per_document is None else options.per_document
    bos = _bos(options.bos, config)
    first = _bos_id(tokenizer) if bos == EACH_WINDOW else None
    make = document_windows if per_document else text_windows
    windows = make(records, tokenizer, window, special=bos == BY_TOKENIZER, first=first)
    return Windows(windows, window, len(records), per_document, bos)


def _bos(asked: str, config: Any) -> str:
    if asked == "auto":
        needs_it = str(config.get_text_config().model_type).startswith(_NEED_BOS)
        return EACH_WINDOW if needs_it else BY_TOKENIZER
    return EACH_WINDOW if asked == "always" else NOWHERE


def _bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    found: Any = tokenizer.bos_token_id
    if found is None:
        raise UsageError("bos always: the model's tokenizer has no beginning-of-text token; pass --bos auto or never")
    return found


def _is_by_document(text: str) -> bool:
    """Whether a source consists of unrelated documents."""
    return text != STANDARD_LIBRARY and data_suffix(Path(text)) not in (".txt", ".txt.gz")


def text_windows(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    *,
    special: bool = True,
    first: int | None = None,
) -> list[Sequence[int]]:
    """Full windows of the joined text.

    Args:
        records: the documents.
        tokenizer: the model's.
        window: tokens in a window, `first` included.
        special: whether the tokenizer adds its special tokens to the text, which is to the first window.
        first: token to begin every window with.

    Raises:
        UsageError: the text is shorter than one window.
    """
    [ids] = encode(["\n\n".join(render(record, tokenizer) for record in records)], tokenizer, special=special)
    windows = [piece for piece in _cut(ids, window, first) if len(piece) == window]
    if not windows:
        raise UsageError(
            f"the text has {len(ids)} tokens, less than one window of {window}; pass --window or --per-document"
        )
    return windows


def document_windows(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    *,
    special: bool = True,
    first: int | None = None,
) -> list[Sequence[int]]:
    """Windows of each document by itself, tails included; windows without a token to predict are left out.

    Arguments as for `text_windows`.

    Raises:
        UsageError: no window is left.
    """
    ids = documents(records, tokenizer, special=special)
    windows = [piece for one in ids for piece in _cut(one, window, first) if len(piece) > 1]
    if not windows:
        raise UsageError("no document has two tokens or more, so there is nothing to predict; give more text")
    return windows


def _cut(ids: Sequence[int], window: int, first: int | None) -> list[Sequence[int]]:
    """Consecutive windows, each with the token `first` before it if there is one."""
    if first is None:
        return cut(ids, window)
    ids = ids[1:] if ids and ids[0] == first else ids  # a chat template has put it there
    return [[first, *piece] for piece in cut(ids, window - 1)]


def perplexity_of(model: PreTrainedModel | PeftModel, windows: Sequence[Sequence[int]]) -> Score:
    """Score each window of token ids by itself: the sum of -log p(token | tokens before it in the window).

    A batch has windows of about the same length. Padding is on the right, after all scored tokens, so it has no effect
    on the score.

    Args:
        model: a causal LM; it is put into eval mode.
        windows: token ids, two or more each.

    Raises:
        UsageError: a token id is beyond the model's vocabulary.
        SppError: a log-likelihood is not finite.
    """
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    require_known_ids(windows, vocabulary, "text")
    batches = list(_batches(windows, vocabulary))
    total, tokens = 0.0, 0
    for batch in track(batches, "evaluating"):
        losses = _losses(model, *(tensor.to(model.device) for tensor in _padded(batch)))
        total += float(losses.sum(dtype=torch.float64))
        tokens += losses.numel()
        require_finite(total)
    return Score(total, tokens)


def require_finite(total: float) -> None:
    """Refuse a sum of log-likelihoods that is not finite."""
    if not math.isfinite(total):
        raise SppError(
            "the model gives log-likelihoods that are not finite, so it has no perplexity; its weights are damaged, or "
            "the dtype is too narrow for them (pass --dtype float32)"
        )


def _batches(windows: Sequence[Sequence[int]], vocabulary: int) -> Iterator[list[Sequence[int]]]:
    """Windows in order of falling length, in batches as large as the limits allow, of at least one window."""
    batch: list[Sequence[int]] = []
    for window in sorted(windows, key=len, reverse=True):
        length = len(batch[0]) if batch else len(window)
        most = min(_TOKENS_AT_ONCE, _LOGITS_AT_ONCE // vocabulary) // length
        if batch and len(batch) >= most:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _padded(batch: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right with a valid id, and a mask that is 0 on the padding; (N, T) each."""
    length = max(len(window) for window in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(batch):
        ids[row, : len(window)] = torch.as_tensor(window)
        mask[row, : len(window)] = 1
    return ids, mask


@torch.no_grad()
def _losses(model: PreTrainedModel | PeftModel, ids: Tensor, mask: Tensor) -> Tensor:
    """-log p of every predicted token except padding, in nats: fp32, one dimension."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    predicted = mask[:, 1:].bool()
    logits, targets = logits[predicted], ids[:, 1:][predicted]
    rows = rows_at_once(logits.shape[-1])
    pieces = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.cat([losses_of(*pair) for pair in pieces])


def rows_at_once(vocabulary: int) -> int:
    """Tokens whose log-probabilities are computed at once."""
    return max(1, _LOG_SOFTMAX_AT_ONCE // vocabulary)


def losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of tokens (n,), in nats, given their logits (n, V) in any float dtype: fp32."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """The result of `evaluate`: the perplexity, and the protocol by which it was measured.

    Attributes:
        perplexity: exp(nll).
        nll: mean over predicted tokens, in nats.
        unit: of the perplexity: per token of the model's tokenizer.
        tokens: number of predicted tokens.
        documents: number of records read, after `--limit`.
        windows: number of windows scored.
        window: most tokens in a window.
        stride: tokens between the starts of two windows; equal to `window`, as windows never overlap.
        dtype: dtype that the model computed in; log-probabilities are always fp32.
        source: the text.
        bos: which windows begin with the beginning-of-text token: `in each window`,
            `nowhere`, or `as the tokenizer adds it`.
        streamed: whether it was computed block by block.
    """

    perplexity: float
    nll: float
    unit: str
    tokens: int
    documents: int
    windows: int
    window: int
    stride: int
    per_document: bool
    dtype: str
    source: str
    bos: str
    streamed: bool
    seconds: float

    @classmethod
    def of(
        cls, score: Score, text: Windows, source: str, dtype: str, seconds: float, *, streamed: bool = False
    ) -> EvalReport:
        """The report on a score over windows of the text that `source` names."""
        return cls(
            perplexity=score.perplexity,
            nll=score.nll,
            unit="token",
            tokens=score.tokens,
            documents=text.documents,
            windows=len(text.windows),
            window=text.window,
            stride=text.window,
            per_document=text.per_document,
            dtype=dtype,
            source=source,
            bos=text.bos,
            streamed=streamed,
            seconds=seconds,
        )
