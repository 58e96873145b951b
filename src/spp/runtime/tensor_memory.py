"""Count the bytes of live tensors, op by op; with fake tensors, nothing is computed or allocated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active, counts the storages that ops allocate, each until its last tensor is freed.

    Attributes:
        now: bytes of live storages that were allocated while this was active.
        peak: largest value of `now`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = _grouped(*args) if func is _GROUPED_MM else func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # a view of an argument allocates nothing
        for storage in _storages(result):
            if storage._cdata not in given:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


_GROUPED_MM = torch.ops.aten._grouped_mm.default


def _grouped(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor | None = None, *_: Any) -> torch.Tensor:
    """What torch's product of grouped matrices returns, but for values; its own fake version knows bfloat16 alone."""
    groups = [] if 3 in (a.ndim, b.ndim) and a.ndim != b.ndim else [len(a) if offsets is None else len(offsets)]
    return a.new_empty([*groups, a.shape[-2], b.shape[-1]])


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def make_fake(model: nn.Module, device: torch.device) -> None:
    """Replace a model's parameters and buffers by fake ones on a device; call it in a FakeTensorMode."""
    for module in model.modules():
        for name, held in module._parameters.items():
            if held is not None:
                fake = torch.empty(held.shape, dtype=held.dtype, device=device)
                module._parameters[name] = nn.Parameter(fake, requires_grad=held.requires_grad)
        for name, held in module._buffers.items():
            if held is not None:
                module._buffers[name] = torch.empty(held.shape, dtype=held.dtype, device=device)


def peak_of_a_step(model: nn.Module, batch: dict[str, torch.Size], device: torch.device) -> int:
    """Peak bytes of the forward and backward pass of a training step, besides the parameters.

    Nothing is computed: parameters and buffers are replaced by fake ones, so `model` cannot be used afterwards.

    Args:
        model: in training mode, on any device, also the meta device; its output has `loss` and `logits`.
        batch: name -> shape of its integer inputs.
        device: device that the step would run on; kernels of devices differ in what they save.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(model, device)
        inputs = {name: torch.ones(shape, dtype=torch.int64, device=device) for name, shape in batch.items()}
        with LiveBytes() as live:
            output = model(**inputs)
            loss = output.loss
            del output  # and with it the logits, as in training
            loss.backward()
    return live.peak
