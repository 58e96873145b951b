"""Call a model's decoder blocks one at a time, exactly as the model itself calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from spp.errors import SppError
from spp.pruning.calibration.hidden_states import States

# Most tokens that one call computes, unless a single window is longer.
_TOKENS_PER_CALL = 2048


def batched(windows: Tensor) -> list[Tensor]:
    """Calibration windows (samples, window), divided into batches that are computed at once."""
    return list(windows.split(max(_TOKENS_PER_CALL // windows.shape[1], 1)))


@dataclass
class BlockCalls:
    """How the model calls one block, batch by batch, apart from the hidden states.

    Attributes:
        args: batch -> positional arguments after the hidden states.
        kwargs: batch -> keyword arguments (masks, positions, rotary embeddings).
    """

    args: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    kwargs: dict[int, dict[str, Any]] = field(default_factory=dict)

    def add(self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the arguments of one batch."""
        self.args[batch] = _shared(args, next(iter(self.args.values()), None))
        self.kwargs[batch] = _shared(kwargs, next(iter(self.kwargs.values()), None))

    def run(self, block: Callable[..., Any], batch: int, hidden: Tensor) -> Tensor:
        """The output of a block, or of a function in its place, for hidden states (samples, window, features)."""
        # A copy, because a block may add to its input in place, and `hidden` is needed again.
        output = block(hidden.clone(), *self.args[batch], **self.kwargs[batch])
        return output[0] if isinstance(output, tuple) else output


def capture(
    model: PreTrainedModel, blocks: list[nn.Module], batches: Mapping[int, Tensor], hidden: States | None
) -> list[BlockCalls]:
    """Record how the model calls each block, and the input of the first one.

    The model runs its own forward, with every block replaced by a recorder: so masks, positions and whatever else the
    blocks get are right even where they differ between blocks (sliding and full attention in one model). One batch
    goes through the first block, to see in what form it returns its output; else the states are passed straight
    through.

    Args:
        model: a causal LM; whatever runs before its blocks has its weights, and so does the first block.
        blocks: its decoder blocks.
        batches: number -> (windows, tokens) int64 token ids, on the device of the model.
        hidden: stores the hidden states that enter the first block; None discards them.

    Raises:
        SppError: the model does not call its blocks one after the other.
    """
    recorders = _Recorders(blocks, hidden)
    with _replaced_forwards(blocks, [recorders.forward(index) for index in range(len(blocks))]):
        for number, tokens in batches.items():
            recorders.batch = number
            try:
                model(input_ids=tokens, use_cache=False)
            except _Recorded:
                continue
            raise SppError(f"{type(model).__name__} does not run through all of its decoder blocks")
    return recorders.calls


class _Recorded(Exception):
    """The last block has been reached: neither it nor the head, often the largest matrix of all, need run."""


class _Recorders:
    """Replacements for the blocks while the model runs.

    Attributes:
        calls: the recorded calls of each block.
        batch: number of the batch that is running.
    """

    def __init__(self, blocks: list[nn.Module], hidden: States | None) -> None:
        self.calls = [BlockCalls() for _ in blocks]
        self.batch = 0
        self._hidden = hidden
        self._first = blocks[0].forward
        self._items: int | None = None  # in the tuple that a block returns, hidden states first; 0 where it is none

    def forward(self, index: int) -> Callable[..., Any]:
        """The function to call instead of block `index`."""

        def record(*args: Any, **kwargs: Any) -> Any:
            states, args, kwargs = _take_hidden_states(args, kwargs)
            self.calls[index].add(self.batch, args, kwargs)
            if index == 0 and self._hidden is not None:
                self._hidden[self.batch] = states.clone()
            if index == len(self.calls) - 1:
                raise _Recorded
            if self._items is None:
                output = self._first(states.clone(), *args, **kwargs)
                self._items = len(output) if isinstance(output, tuple) else 0
            return (states, *[None] * (self._items - 1)) if self._items else states

        return record


@contextmanager
def _replaced_forwards(modules: list[nn.Module], forwards: list[Callable[..., Any]]) -> Iterator[None]:
    """Context manager in which `forwards` replace the modules' own."""
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def _take_hidden_states(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Split a block's arguments into the hidden states, given by position or by name, and the rest."""
    if args:
        return args[0], args[1:], kwargs
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], (), rest


def _shared(value: Any, first: Any) -> Any:
    """`value`, with every tensor that equals its counterpart in `first` replaced by that one.

    Masks and rotary embeddings are the same for all batches of one shape; this keeps one copy of them.
    """
    if isinstance(value, Tensor) and isinstance(first, Tensor):
        return first if value.dtype == first.dtype and value.equal(first) else value
    if isinstance(value, tuple) and isinstance(first, tuple) and len(value) == len(first):
        return tuple(_shared(*pair) for pair in zip(value, first, strict=True))
    if isinstance(value, dict) and isinstance(first, dict):
        return {name: _shared(item, first.get(name)) for name, item in value.items()}
    return value
