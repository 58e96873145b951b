"""What passes from one block to the next, and where it is kept: one state per batch of calibration windows."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from spp.checkpoints.json_files import sync
from spp.checkpoints.safetensors_file import save_tensors
from spp.checkpoints.unfinished import going_on_from
from spp.errors import SppError

_KEY, _CARRIED = "hidden", "carried"
_THREADS, _MOST_WAITING = 4, 8

Carried = dict[str, dict[Any, Any]]
"""Argument of the blocks, a container -> what earlier blocks have put into it, by its key or index."""


@dataclass(frozen=True)
class State:
    """What enters a block.

    Attributes:
        hidden: hidden states (windows, tokens, features); not to be changed in place.
        carried: what the blocks before it have left for later ones beside the hidden states, such as Gemma 4's keys
            and values that several layers share.
    """

    hidden: Tensor
    carried: Carried = field(default_factory=dict)

    def to(self, device: torch.device) -> State:
        """The same on a device."""
        return State(self.hidden.to(device), _map_tensors(self.carried, lambda tensor: tensor.to(device)))


class States(Protocol):
    """States by batch number."""

    def __getitem__(self, batch: int, /) -> State:
        """That of one batch."""
        ...

    def __setitem__(self, batch: int, state: State, /) -> None:
        """Keep that of one batch."""
        ...


class StatesWriter:
    """Writes and deletes files of states; states from a GPU are written while it continues computing."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS)
        self._waiting: dict[Path, Future[None]] = {}

    def write(self, state: State, path: Path) -> None:
        """Write a state, now or until `wait` returns."""
        if not state.hidden.is_cuda:
            _save(state, path)
            return
        if len(self._waiting) >= _MOST_WAITING:
            self.wait_for(next(iter(self._waiting)))
        device = state.hidden.device
        to_cpu = partial(Tensor.to, device="cpu", non_blocking=True)  # pinned memory, once the GPU has come to it
        copy = State(to_cpu(state.hidden), _map_tensors(state.carried, to_cpu))
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(device))
        self.later(path, partial(_save_later, copied, copy, path))

    def later(self, path: Path, work: Callable[[], None]) -> None:
        """Do something with a path while other work goes on."""
        self._waiting[path] = self._threads.submit(work)

    def wait_for(self, path: Path) -> None:
        """Wait until all work on a path is done; its errors are raised here."""
        if work := self._waiting.pop(path, None):
            work.result()

    def wait(self) -> None:
        """Wait until all work is done, as `wait_for`."""
        for path in list(self._waiting):
            self.wait_for(path)

    def close(self) -> None:
        """Wait until all work is done, ignoring errors; nothing can be written afterwards."""
        self._threads.shutdown()


def _save(state: State, path: Path) -> None:
    tensors: list[Tensor] = []
    carried = json.dumps(_encoded(state.carried, tensors))
    # Clones, because a file cannot hold tensors that share memory.
    numbered = {
        str(number): tensor.cpu().clone(memory_format=torch.contiguous_format) for number, tensor in enumerate(tensors)
    }
    save_tensors(path, {_KEY: state.hidden.cpu(), **numbered}, {_CARRIED: carried})


def _save_later(copied: torch.cuda.Event, state: State, path: Path) -> None:
    copied.synchronize()
    _save(state, path)
    sync(path)  # here, because it takes as long as writing


def _load(path: Path) -> State:
    with going_on_from(path), safe_open(path, framework="pt") as file:
        carried = json.loads(file.metadata()[_CARRIED])
        return State(file.get_tensor(_KEY), _decoded(carried, lambda number: file.get_tensor(str(number))))


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in its dicts, lists and tuples changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(one, change) for one in value)
    return value


def _encoded(value: Any, tensors: list[Tensor]) -> Any:
    """As JSON, `value` as [kind, content], with its tensors by their numbers in `tensors`, to which they are added."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return ["tensor", len(tensors) - 1]
    if isinstance(value, dict):
        return ["dict", [[_encoded(key, tensors), _encoded(one, tensors)] for key, one in value.items()]]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_encoded(one, tensors) for one in value]]
    if value is None or isinstance(value, bool | int | float | str):
        return ["plain", value]
    raise SppError(
        f"a block of this model passes a {type(value).__name__} on to later blocks, which cannot be kept between them; "
        "prune it with the criterion magnitude, and evaluate it without --stream"
    )


def _decoded(encoded: Any, tensor: Callable[[int], Tensor]) -> Any:
    kind, content = encoded
    if kind == "tensor":
        return tensor(content)
    if kind == "dict":
        return {_decoded(key, tensor): _decoded(one, tensor) for key, one in content}
    if kind in ("list", "tuple"):
        items = [_decoded(one, tensor) for one in content]
        return items if kind == "list" else tuple(items)
    return content


class FolderStates:
    """States on disk, one file per batch, so that few batches are in memory, and a killed run can resume.

    Args:
        folder: created if it does not exist.
        writer: shared by all `FolderStates`.
    """

    def __init__(self, folder: Path, writer: StatesWriter) -> None:
        self._folder, self._writer = folder, writer
        folder.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, batch: int) -> State:
        path = self._path(batch)
        self._writer.wait_for(path)
        return _load(path)

    def __setitem__(self, batch: int, state: State) -> None:
        self._writer.write(state, self._path(batch))

    def _path(self, batch: int) -> Path:
        return self._folder / f"{batch:06}.safetensors"
