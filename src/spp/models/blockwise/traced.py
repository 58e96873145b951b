"""The memory of calls of a model's blocks, traced on fake tensors, which computes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from spp.models.architecture import decoder_blocks, prunable_matrices
from spp.models.blockwise.block_calls import BlockCalls, after_blocks, capture
from spp.models.blockwise.hidden_states import State
from spp.runtime.tensor_memory import LiveBytes, make_fake


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def heaviest_block(model: PreTrainedModel) -> int:
    """The index of the block with most bytes."""
    blocks = decoder_blocks(model)[1]
    return max(range(len(blocks)), key=lambda index: nbytes(blocks[index].parameters()))


@dataclass(frozen=True)
class TracedBlock:
    """A block of fake tensors, and how it is called.

    Attributes:
        index: of the block.
        block: the block.
        capturing: peak bytes of what runs before the blocks, besides its weights.
    """

    index: int
    block: nn.Module
    capturing: int
    _model: PreTrainedModel
    _tokens: Tensor
    _calls: list[BlockCalls]
    _state: State

    def run(self) -> Tensor:
        """What leaves the block."""
        return self._calls[self.index].run(self.block, 0, self._state).hidden

    def logits(self, tokens: int) -> Tensor:
        """The logits of so many tokens of one window, from what leaves the last block."""
        some, hidden = self._tokens[:1, :tokens], self._state.hidden[:1, :tokens]
        return after_blocks(self._model, decoder_blocks(self._model)[1], self._calls, some, hidden)


@contextmanager
def traced(model: PreTrainedModel, index: int, shape: Sequence[int], device: torch.device) -> Iterator[TracedBlock]:
    """Context manager in which tensors are fake, and so the model's; it cannot be used afterwards.

    Args:
        model: on the meta device.
        index: the block to run; if the model skips it on text, the first that it does not skip is run.
        shape: (windows, tokens) of a batch.
        device: that would compute; kernels of devices differ in what they need.
    """
    prefix, blocks = decoder_blocks(model)
    for owner in _owners_of_experts(prefix, blocks):
        owner.forward = _stand_in  # where tokens go depends on numbers, which fake tensors have not
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(model, device)
        tokens = torch.zeros(*shape, dtype=torch.int64, device=device)
        hidden: dict[int, State] = {}
        with torch.no_grad(), LiveBytes() as live:
            calls = capture(model, blocks, {0: tokens}, hidden)
        index = index if not calls[index].skipped else next(at for at, one in enumerate(calls) if not one.skipped)
        with torch.no_grad():
            state = _entering(index, blocks, calls, hidden[0])
        yield TracedBlock(index, blocks[index], live.peak, model, tokens, calls, state)


def _owners_of_experts(prefix: str, blocks: Sequence[nn.Module]) -> set[nn.Module]:
    matrices = (one for number, block in enumerate(blocks) for one in prunable_matrices(f"{prefix}.{number}", block))
    return {matrix.owner for matrix in matrices if matrix.expert is not None}


def _entering(index: int, blocks: Sequence[nn.Module], calls: Sequence[BlockCalls], first: State) -> State:
    """What can enter a block, from what enters the first; others only run if they may leave something for it."""
    if not calls[index].shares:
        return first
    state = first
    for block, call in zip(blocks[:index], calls[:index], strict=True):
        state = call.run(block, 0, state)
    return state


def _stand_in(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    """A stand-in for experts: a tensor of their output's size."""
    return torch.zeros_like(hidden)
