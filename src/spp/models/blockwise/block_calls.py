"""Call a model's decoder blocks one at a time, exactly as the model itself calls them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from spp.errors import SppError
from spp.models.blockwise.hidden_states import Carried, State, States

# Most tokens that one call computes, unless a single window is longer.
_TOKENS_PER_CALL = 2048


def batched(windows: Tensor) -> list[Tensor]:
    """Calibration windows (samples, window), divided into batches that are computed at once."""
    return list(windows.split(max(_TOKENS_PER_CALL // windows.shape[1], 1)))


@dataclass
class BlockCalls:
    """How the model calls one block, batch by batch, apart from the hidden states.

    Attributes:
        args: batch -> positional arguments after the hidden states; none if the model skips the block.
        kwargs: batch -> keyword arguments (masks, positions, rotary embeddings).
        form: makes what the model expects a block to return of hidden states.
    """

    args: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    kwargs: dict[int, dict[str, Any]] = field(default_factory=dict)
    form: Callable[[Tensor], Any] = field(default=lambda hidden: hidden)

    def add(self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the arguments of one batch."""
        self.args[batch] = _shared(args, next(reversed(self.args.values()), None))
        self.kwargs[batch] = _shared(kwargs, next(reversed(self.kwargs.values()), None))

    @property
    def skipped(self) -> bool:
        """Whether the model does not call the block on text, as Llama 3.2 Vision its cross attention."""
        return not self.args

    @property
    def shares(self) -> bool:
        """Whether the block gets a container, in which earlier blocks may have left something for it."""
        return any(_containers(self.args[batch], self.kwargs[batch]) for batch in self.args)

    def run(self, block: Callable[..., Any], batch: int, state: State) -> State:
        """What leaves a block, or what stands for it, where `state` enters it; a block that is skipped passes it on.

        The block gets copies of all that it may change.
        """
        if self.skipped:
            return state
        output, carried = self.call(block, batch, state)
        return State(output[0] if isinstance(output, tuple | list) else output, carried)

    def call(self, block: Callable[..., Any], batch: int, state: State) -> tuple[Any, Carried]:
        """All that a block returns, and what is carried on after it."""
        args, kwargs = list(self.args[batch]), dict(self.kwargs[batch])
        given = _containers(self.args[batch], self.kwargs[batch])
        filled = {name: _filled(container, state.carried.get(name, {})) for name, container in given.items()}
        for name, container in filled.items():
            if name in kwargs:
                kwargs[name] = container
            else:
                args[int(name)] = container
        before = {name: dict(_items(container)) for name, container in filled.items()}
        output = block(state.hidden.clone(), *args, **kwargs)
        carried: Carried = {}
        for name, container in filled.items():
            new = {key: one for key, one in _items(container) if before[name].get(key, _NOTHING) is not one}
            if items := state.carried.get(name, {}) | new:
                carried[name] = items
        return output, carried


_NOTHING = object()


def _containers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a block can put something into, by name or position."""
    named = {**{str(index): one for index, one in enumerate(args)}, **kwargs}
    return {name: one for name, one in named.items() if isinstance(one, MutableMapping | MutableSequence)}


def _filled(container: Any, carried: Mapping[Any, Any]) -> Any:
    """A copy of a container with what is carried in it."""
    filled = copy.copy(container)
    for key, item in carried.items():
        if isinstance(filled, MutableSequence) and key >= len(filled):
            filled.append(item)
        else:
            filled[key] = item
    return filled


def _items(container: Any) -> Iterator[tuple[Any, Any]]:
    return iter(container.items()) if isinstance(container, MutableMapping) else iter(enumerate(container))


def capture(
    model: PreTrainedModel,
    blocks: list[nn.Module],
    batches: Mapping[int, Tensor],
    hidden: States | None,
    loaded: Callable[[int], AbstractContextManager[Any]] = nullcontext,
) -> list[BlockCalls]:
    """How the model calls each block, and what enters the first one.

    The model runs its own forward, with every block replaced by a recorder: so masks, positions and whatever else the
    blocks get are right even where they differ between blocks (sliding and full attention in one model). One batch
    goes through the first block that is called, to see in what form it returns its output; else the states are passed
    straight through.

    Args:
        model: a causal LM; whatever runs before its blocks has its weights.
        blocks: its decoder blocks.
        batches: number -> (windows, tokens) int64 token ids, on the device of the model.
        hidden: takes what enters the first block, if it is wanted.
        loaded: gives a context manager in which the block of an index has its weights; needed if it has none yet.

    Raises:
        SppError: the model does not call its blocks one after the other.
    """
    recorders = _Recorders(blocks, hidden, loaded)
    with _replaced_forwards(blocks, [recorders.forward(index) for index in range(len(blocks))]):
        for number, tokens in batches.items():
            recorders.start(number)
            try:
                model(input_ids=tokens, use_cache=False)
            except _Recorded:
                continue
            recorders.end(type(model).__name__)
    return recorders.calls


def after_blocks(
    model: PreTrainedModel, blocks: list[nn.Module], calls: list[BlockCalls], tokens: Tensor, hidden: Tensor
) -> Tensor:
    """The logits of hidden states that leave the last block.

    The model runs its own forward, so its norm, its head and what else it does are right. It does these position by
    position, so any positions may be put together.

    Args:
        model: a causal LM; whatever runs outside of its blocks has its weights.
        blocks: its decoder blocks.
        calls: how it calls them.
        tokens: (windows, tokens) int64: any valid ids, no more of them than the model has positions.
        hidden: (windows, tokens, features).
    """
    with _replaced_forwards(blocks, [partial(_pass_on, one.form, hidden) for one in calls]):
        return model(input_ids=tokens, use_cache=False).logits


def _pass_on(form: Callable[[Tensor], Any], hidden: Tensor, *_: Any, **__: Any) -> Any:
    """What stands for a block when all blocks have run: it returns what leaves the last one."""
    return form(hidden)


class _Recorded(Exception):
    """The last block has been reached: neither it nor the head, often the largest matrix of all, need run."""


class _Recorders:
    """What stands for the blocks while the model runs.

    Attributes:
        calls: what they have seen, by block.
    """

    def __init__(
        self, blocks: list[nn.Module], hidden: States | None, loaded: Callable[[int], AbstractContextManager[Any]]
    ) -> None:
        self.calls = [BlockCalls() for _ in blocks]
        self._loaded = loaded
        self._hidden = hidden
        self._forwards = [block.forward for block in blocks]
        self._batch = 0
        self._latest = -1  # block that was called
        self._last = len(blocks) - 1  # that the model calls
        self._form: Callable[[Tensor], Any] | None = None  # makes what a block returns of hidden states

    def start(self, batch: int) -> None:
        """The next call of the model is on this batch."""
        self._batch, self._latest = batch, -1

    def end(self, model: str) -> None:
        """The model has run to its end: it skips its last blocks, or even all."""
        if self._latest < 0:
            raise SppError(f"{model} does not run through its decoder blocks")
        self._last = self._latest

    def forward(self, index: int) -> Callable[..., Any]:
        """What to call instead of block `index`."""

        def record(*args: Any, **kwargs: Any) -> Any:
            if index <= self._latest:
                raise SppError(
                    f"the model calls its decoder block {index} after block {self._latest}, and what is done block by "
                    "block goes through them once, in order; prune it with the criterion magnitude, and evaluate it "
                    "without --stream"
                )
            hidden, args, kwargs = _take_hidden_states(args, kwargs)
            self.calls[index].add(self._batch, args, kwargs)
            if self._latest < 0 and self._hidden is not None:
                self._hidden[self._batch] = State(hidden.clone())
            self._latest = index
            if self._form is None:
                with self._loaded(index):
                    output, _ = self.calls[index].call(self._forwards[index], self._batch, State(hidden))
                self._form = _form_of(output)
                for calls in self.calls:
                    calls.form = self._form
            if index == self._last:
                raise _Recorded
            return self._form(hidden)

        return record


def _form_of(output: Any) -> Callable[[Tensor], Any]:
    """A function that makes hidden states into what a block returns: a tuple or list that they are the first of."""
    if not isinstance(output, tuple | list):
        return lambda hidden: hidden
    others = [None] * (len(output) - 1)
    return lambda hidden: type(output)([hidden, *others])


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

    Masks and rotary embeddings are the same for all batches of one shape; this keeps one copy of them, where batches of
    one shape follow each other.
    """
    if isinstance(value, Tensor) and isinstance(first, Tensor):
        return first if value.dtype == first.dtype and value.equal(first) else value
    if isinstance(value, tuple) and isinstance(first, tuple) and len(value) == len(first):
        return tuple(_shared(*pair) for pair in zip(value, first, strict=True))
    if isinstance(value, dict) and isinstance(first, dict):
        return {name: _shared(item, first.get(name)) for name, item in value.items()}
    return value
