"""Perplexity of models of any size: block by block, with hidden states on disk.

Each block of each model is read once, run on all windows, and forgotten. Windows that are shorter than others are
padded on the right, after all scored tokens, without a mask: a causal model does not see what comes later. The norm and
the head are run by the model's own forward, on a few tokens at a time. A killed evaluation goes on after the last
finished block.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from spp._version import __version__
from spp.checkpoints.checkpoint import Checkpoint, is_plain
from spp.checkpoints.fingerprint import companions_digest, json_digest
from spp.checkpoints.request import Request
from spp.checkpoints.scratch_folder import scratch_folder
from spp.data.tokens import require_known_ids
from spp.errors import SppError, UsageError
from spp.evaluation.options import EvalOptions
from spp.evaluation.perplexity import (
    EvalReport,
    Score,
    Windows,
    losses_of,
    read_windows,
    require_finite,
    rows_at_once,
)
from spp.evaluation.subjects import Subject
from spp.models.architecture import decoder_blocks
from spp.models.blockwise.journal import FolderJournal
from spp.models.blockwise.streamed_blocks import StreamedBlocks
from spp.models.blockwise.walk import Walk
from spp.models.completeness import require_whole
from spp.models.loading import skeleton
from spp.ops.dtypes import dtype_name
from spp.runtime.devices import compute_dtype, pick_device
from spp.runtime.memory import return_freed_memory
from spp.runtime.memory_estimate import available_bytes
from spp.runtime.progress import track

logger = logging.getLogger("spp")

_TOKENS_AT_ONCE = 2048  # that a block is run on, unless a single window is longer
_LENGTHS_PER_OCTAVE = 8  # lengths that windows are padded to; masks and rotary embeddings of each are in memory
_MOST_OF_MEMORY = 0.8  # that a model's weights may take, to be loaded as a whole


def do_not_fit(subjects: Mapping[str, Subject]) -> bool:
    """Whether the weights of a model, in the dtype to compute in, hardly fit into free memory.

    False where one of the models cannot be streamed: it is quantized, or an adapter goes with it.
    """
    if any(one.options.adapter is not None or not is_plain(_quantization(one)) for one in subjects.values()):
        return False
    too_large = [name for name, one in subjects.items() if _loaded_bytes(one) > _MOST_OF_MEMORY * _available(one)]
    if too_large:
        logger.info("%s does not fit into memory, and is evaluated block by block (--stream)", too_large[0])
    return bool(too_large)


def _quantization(subject: Subject) -> object:
    return Checkpoint.open(subject.folder).config.get("quantization_config")


def _available(subject: Subject) -> int:
    return available_bytes(pick_device(subject.options.device))


def _loaded_bytes(subject: Subject) -> int:
    """Bytes of a model's weights in memory; sparse weights of an archive stay packed there."""
    checkpoint = Checkpoint.open(subject.folder)
    dtype = compute_dtype(subject.options.dtype, pick_device(subject.options.device))
    if checkpoint.packed or not isinstance(dtype, torch.dtype):
        return sum(path.stat().st_size for path in checkpoint.headers)
    return sum(math.prod(layout.shape) for layout in checkpoint.layouts.values()) * dtype.itemsize


def stream_perplexities(subjects: Mapping[str, Subject], options: EvalOptions) -> dict[str, EvalReport]:
    """The perplexity of each model; one pass over the blocks goes through all of them.

    Raises:
        UsageError: a wrong option, too little text, a quantized model or one with an adapter, or another process that
            does the same work.
        SppError: a damaged model, one whose output is not finite, or a full disk.
    """
    if options.stream_folder.exists() and not options.stream_folder.is_dir():
        raise UsageError(f"stream-folder {options.stream_folder} is a file; name a folder")
    return_freed_memory()  # before text leaves holes in the heap that tensors would go to
    device = pick_device(options.device)
    models = [StreamedModel(subject, device) for subject in subjects.values()]
    request = Request(
        options.model_dump(mode="json", include={"dtype"}),
        {name: model.digest() for name, model in zip(subjects, models, strict=True)},
        {"spp": __version__, "torch": torch.__version__, "device": device.type},
    )
    try:
        with (
            scratch_folder(options.stream_folder, "spp-eval", request) as folder,
            FolderJournal(folder) as journal,
            torch.no_grad(),
        ):
            walks = [f"model{number}" for number in range(len(models))]
            if not any(map(journal.results, walks)):
                _require_room(folder, models)
            passes = [_Pass(model, journal, walk) for model, walk in zip(models, walks, strict=True)]
            most = max(one.blocks for one in passes)
            for index in track(range(most), "evaluating block by block"):
                for one in passes:
                    one.advance(index)
            return {name: one.report() for name, one in zip(subjects, passes, strict=True)}
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SppError(
            f"no space is left on the disk of {options.stream_folder} ({error}); finished blocks are kept: make room, "
            "and repeat the command to go on, or name another folder with --stream-folder"
        ) from error


def _require_room(folder: Path, models: Sequence[StreamedModel]) -> None:
    """Refuse to begin what would end with a full disk, hours later."""
    needed, free = sum(model.states_bytes for model in models), shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(
            f"hidden states need {needed / 2**30:.1f} GiB, and the disk of {folder.parent} has {free / 2**30:.1f} GiB "
            "left; make room, name another folder with --stream-folder, or evaluate fewer models at once"
        )


@dataclass(frozen=True)
class Batch:
    """Windows that are run at once: token ids (N, T), padded on the right, and the length of each window."""

    ids: Tensor
    lengths: list[int]

    def predicted(self) -> Tensor:
        """Which tokens predict one of the window: (N, T - 1), bool."""
        positions = torch.arange(1, self.ids.shape[1], device=self.ids.device)
        return positions < torch.tensor(self.lengths, device=self.ids.device)[:, None]


def batches_of(windows: Sequence[Sequence[int]], device: torch.device) -> dict[int, Batch]:
    """The windows in batches of about equal lengths, the longest first, so that there are few shapes.

    Args:
        windows: token ids, two or more each.
        device: for the ids.
    """
    longest = max(map(len, windows))
    ordered = sorted(windows, key=len, reverse=True)
    batches: list[Batch] = []
    for length, some in groupby(ordered, key=lambda window: min(_padded_length(len(window)), longest)):
        of_length = list(some)
        count = max(1, _TOKENS_AT_ONCE // length)
        for start in range(0, len(of_length), count):
            batches.append(_batch(of_length[start : start + count], length, device))
    return dict(enumerate(batches))


def _padded_length(length: int) -> int:
    """The next of `_LENGTHS_PER_OCTAVE` lengths between two powers of two."""
    step = max(1, 2 ** ((length - 1).bit_length() - 1) // _LENGTHS_PER_OCTAVE)
    return -(-length // step) * step


def _batch(windows: Sequence[Sequence[int]], length: int, device: torch.device) -> Batch:
    ids = torch.zeros(len(windows), length, dtype=torch.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = torch.as_tensor(window)
    return Batch(ids.to(device), [len(window) for window in windows])


class StreamedModel:
    """A model that stays in its files, and the text that it is to be scored on.

    Attributes:
        text: its windows.
        source: what the user calls the text.
        checkpoint: its files.
        model: without weights.
        blocks: its decoder blocks.
        batches: the windows in batches.

    Raises:
        UsageError: see `stream_perplexities`.
        SppError: the model's files do not fit its configuration.
    """

    def __init__(self, subject: Subject, device: torch.device) -> None:
        options, self.folder = subject.options, subject.folder
        self.checkpoint = Checkpoint.open(subject.folder)
        self.checkpoint.require_unquantized("--stream reads plain and packed weights; leave it out")
        if options.adapter is not None:
            raise UsageError(f"--stream cannot attach the adapter {options.adapter}; merge it first, or leave it out")
        self.source = options.text
        self.text: Windows = read_windows(options, subject.folder)
        self.model = skeleton(subject.folder, options, compute_dtype(options.dtype, device))
        require_whole(self.model, self.checkpoint)
        require_known_ids(self.text.windows, self.vocabulary, "text")
        self.blocks = StreamedBlocks(self.model, self.checkpoint, device)
        self.batches = batches_of(self.text.windows, device)

    @property
    def vocabulary(self) -> int:
        """Number of different token ids."""
        return self.model.config.get_text_config().vocab_size

    @property
    def states_bytes(self) -> int:
        """Bytes on disk of the hidden states that enter a block, and of those that leave it."""
        tokens = sum(batch.ids.numel() for batch in self.batches.values())
        return 2 * tokens * self.model.config.get_text_config().hidden_size * self.model.dtype.itemsize

    def digest(self) -> str:
        """What tells this model and text from others: the text itself, and what files say about their content.

        That is their size and the time of their last change: reading all of a large model would take as long as the
        evaluation of a few blocks.
        """
        stats = {str(path): path.stat() for path in self.checkpoint.headers}
        files = [[path, one.st_size, one.st_mtime_ns] for path, one in stats.items()]
        text = hashlib.sha256()
        for batch in self.batches.values():
            text.update(batch.ids.cpu().numpy().tobytes())
            text.update(repr(batch.lengths).encode())
        return json_digest([files, companions_digest(self.folder), text.hexdigest()])


class _Pass:
    """One model's way through its blocks, to its score."""

    def __init__(self, model: StreamedModel, journal: FolderJournal, name: str) -> None:
        self._model, self._seconds = model, 0.0
        self.blocks = len(decoder_blocks(model.model)[1])
        self._walk = Walk(model.blocks, {number: batch.ids for number, batch in model.batches.items()}, journal)
        start = time.perf_counter()
        self._walk.start(name)
        self._seconds += time.perf_counter() - start

    def advance(self, index: int) -> None:
        """Run a block, unless it has been run, or the model has fewer; after the last one, score what leaves it."""
        if not len(self._walk.results()) <= index < self.blocks:
            return
        start = time.perf_counter()
        with self._model.blocks.loaded(index) as block:
            self._walk.propagate(index, block)
        self._walk.finish(self._score() if self._walk.is_last(index) else None)
        self._seconds += time.perf_counter() - start

    def report(self) -> EvalReport:
        """The perplexity; the seconds are those of this process."""
        score = Score(*self._walk.results()[-1])
        dtype = dtype_name(self._model.model.dtype)
        return EvalReport.of(score, self._model.text, self._model.source, dtype, self._seconds, streamed=True)

    def _score(self) -> tuple[float, int]:
        """Nats over all predicted tokens, and their number."""
        total, tokens = 0.0, 0
        with self._model.blocks.surroundings():
            for number, batch in self._model.batches.items():
                losses = self._losses(batch, self._walk.outcome(number))
                total += float(losses.sum(dtype=torch.float64))
                tokens += losses.numel()
                require_finite(total)
        return total, tokens

    def _losses(self, batch: Batch, hidden: Tensor) -> Tensor:
        """-log p of every predicted token of a batch, given what leaves the last block."""
        predicted = batch.predicted()
        rows = min(rows_at_once(self._model.vocabulary), batch.ids.shape[1])
        pieces = zip(
            batch.ids[:, :-1][predicted].split(rows),
            hidden[:, :-1][predicted].split(rows),
            batch.ids[:, 1:][predicted].split(rows),
            strict=True,
        )
        return torch.cat(
            [losses_of(self._walk.logits(ids[None], states[None])[0], targets) for ids, states, targets in pieces]
        )
