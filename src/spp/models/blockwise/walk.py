"""One pass over a model's decoder blocks in order, in which hidden states go from each block to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spp.models.architecture import decoder_blocks
from spp.models.blockwise.block_calls import BlockCalls, after_blocks, capture
from spp.models.blockwise.journal import Journal
from spp.runtime import distributed
from spp.runtime.progress import track

Runs = Mapping[int, Callable[[Callable[..., Any]], Tensor]]
"""Batch -> function that runs a block, or a function in its place, on that batch; returns its output."""


class BlocksToWalk(Protocol):
    """The decoder blocks of a model, of which as few as possible are in memory.

    Attributes:
        model: the model.
        device: the device that blocks are loaded to.
    """

    model: PreTrainedModel
    device: torch.device

    def surroundings(self) -> AbstractContextManager[None]:
        """Context manager in which all modules outside of the blocks have their weights when they are called."""
        ...

    def loaded(self, index: int) -> AbstractContextManager[nn.Module]:
        """Context manager that yields block `index` with its weights loaded."""
        ...


class Walk:
    """One pass over the blocks in order, in which hidden states go from each to the next."""

    def __init__(
        self, blocks: BlocksToWalk, batches: Mapping[int, Tensor], journal: Journal, *, calibrates: bool = True
    ) -> None:
        self.source, self._batches, self._journal = blocks, batches, journal
        self._calibrates = calibrates
        self._reached: set[int] = set()
        self._prefix, self._blocks = decoder_blocks(blocks.model)
        self._calls: list[BlockCalls] = []
        self._walk = ""

    def start(self, walk: str) -> None:
        """Begin the pass of this name, or go on with it."""
        self._walk = walk
        done = len(self._journal.results(walk))
        if self._batches and done < len(self._blocks):
            hidden = None if done else self._journal.states(walk, 0)
            with self.source.surroundings():
                self._calls = capture(self.source.model, self._blocks, self._batches, hidden, self.source.loaded)
        mine = [index for index, calls in enumerate(self._calls) if not calls.skipped]
        self._reached = {index for one in distributed.all_gather(mine) for index in one}

    def reaches(self, index: int) -> bool:
        """Whether calibration text goes through a block, which the model may skip; True without calibration."""
        return not self._calibrates or index in self._reached

    def unfinished(self, description: str) -> Iterator[int]:
        """The blocks that are left, with a bar."""
        done = len(self._journal.results(self._walk))
        return track(range(done, len(self._blocks)), description, total=len(self._blocks) - done)

    def name(self, index: int) -> str:
        """The full name of a block."""
        return f"{self._prefix}.{index}"

    def runs(self, index: int, stream: str = "main") -> Runs:
        """Batch -> a function that runs a block, or a function in its place, on its input states in a stream."""
        states, calls = self._journal.states(self._walk, index, stream if index else "main"), self._calls

        def run(batch: int, block: Callable[..., Any]) -> Tensor:
            return calls[index].run(block, batch, states[batch].to(self.source.device)).hidden

        return {batch: partial(run, batch) for batch in self._batches}

    def propagate(self, index: int, block: nn.Module, stream: str = "main") -> None:
        """Run a block, and store the input states of the next one in a stream."""
        states = self._journal.states(self._walk, index, stream if index else "main")
        following = self._journal.states(self._walk, index + 1, stream)
        for batch in self._batches:
            following[batch] = self._calls[index].run(block, batch, states[batch].to(self.source.device))

    def targets(self, index: int) -> Callable[[int], Tensor]:
        """Batch -> the output of a block in the dense model, if it was stored."""
        states = self._journal.states(self._walk, index + 1, "dense")
        return lambda batch: states[batch].hidden.to(self.source.device)

    def outcome(self, batch: int) -> Tensor:
        """The hidden states of a batch that have left the last block."""
        return self._journal.states(self._walk, len(self._blocks))[batch].hidden.to(self.source.device)

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The logits of hidden states that have left the last block, in their surroundings; see `after_blocks`."""
        return after_blocks(self.source.model, self._blocks, self._calls, tokens, hidden)

    def is_last(self, index: int) -> bool:
        """Whether it is the last block."""
        return index + 1 == len(self._blocks)

    def results(self) -> list[Any]:
        """The results of all finished blocks."""
        return self._journal.results(self._walk)

    def finish(self, result: object) -> None:
        """Note the block as finished."""
        self._journal.finish(self._walk, result)
