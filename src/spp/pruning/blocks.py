"""Call a model's decoder blocks one at a time, exactly as the model itself calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from spp.errors import SppError, UsageError

# One call computes at most so many tokens at once, or one window where that is longer.
_TOKENS_PER_CALL = 2048


@dataclass
class BlockCalls:
    """How the model calls one block, batch by batch, apart from the hidden states.

    Attributes:
        args: positional arguments after the hidden states, per batch.
        kwargs: keyword arguments (masks, positions, rotary embeddings), per batch.
        returns_tuple: whether the hidden states come back as the first item of a tuple.
    """

    args: list[tuple[Any, ...]] = field(default_factory=list)
    kwargs: list[dict[str, Any]] = field(default_factory=list)
    returns_tuple: bool = False

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the arguments of one more batch."""
        self.args.append(_shared(args, self.args[0] if self.args else None))
        self.kwargs.append(_shared(kwargs, self.kwargs[0] if self.kwargs else None))

    def run(self, block: nn.Module, batch: int, hidden: Tensor) -> Tensor:
        """The block's output for batch number `batch` with hidden states (samples, window, features)."""
        # A copy, because a block may add to its input in place, and `hidden` is needed twice.
        output = block(hidden.clone(), *self.args[batch], **self.kwargs[batch])
        return output[0] if isinstance(output, tuple) else output


def capture(model: PreTrainedModel, blocks: list[nn.Module], windows: Tensor) -> tuple[list[Tensor], list[BlockCalls]]:
    """Hidden states that enter the first block, batch by batch, and how the model calls each block.

    The model runs its own forward, with every block replaced by a recorder: so masks, positions and whatever else the
    blocks get are right even where they differ between blocks (sliding and full attention in one model). The first
    batch goes through the real blocks, to see what they return; the others are passed straight through.

    Args:
        model: a causal LM.
        blocks: its decoder blocks.
        windows: (samples, window) int64 token ids.

    Raises:
        UsageError: the windows hold token ids that the model does not know.
        SppError: the model does not call its blocks one after the other.
    """
    _check_token_ids(model, windows)
    hidden: list[Tensor] = []
    calls = [BlockCalls() for _ in blocks]

    def recorder(index: int, block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def record(*args: Any, **kwargs: Any) -> Any:
            states, args, kwargs = _take_hidden_states(args, kwargs)
            calls[index].add(args, kwargs)
            if index == 0:
                hidden.append(states.clone())
            if index == len(blocks) - 1:
                raise _Recorded
            if len(hidden) == 1:
                output = forward(states, *args, **kwargs)
                calls[index].returns_tuple = isinstance(output, tuple)
                return output
            return (states,) if calls[index].returns_tuple else states

        return record

    recorders = [recorder(index, block) for index, block in enumerate(blocks)]
    size = max(_TOKENS_PER_CALL // windows.shape[1], 1)
    with _replaced_forwards(blocks, recorders):
        for batch in windows.split(size):
            try:
                model(input_ids=batch.to(model.device), use_cache=False)
            except _Recorded:
                continue
            raise SppError(f"{type(model).__name__} does not run through all of its decoder blocks")
    return hidden, calls


class _Recorded(Exception):
    """The last block has been reached: neither it nor the head, often the largest matrix of all, need run."""


def _check_token_ids(model: PreTrainedModel, windows: Tensor) -> None:
    known = model.get_input_embeddings().get_parameter("weight").shape[0]
    if int(windows.max()) >= known or int(windows.min()) < 0:
        raise UsageError(
            f"the calibration windows hold token ids from {int(windows.min())} to {int(windows.max())}, but the model "
            f"knows {known} tokens; the tokenizer belongs to another model"
        )


@contextmanager
def _replaced_forwards(modules: list[nn.Module], forwards: list[Callable[..., Any]]) -> Iterator[None]:
    """Call `forwards` instead of the modules' own inside; afterwards everything is as it was."""
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
