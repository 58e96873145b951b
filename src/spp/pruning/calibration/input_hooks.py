"""Hooks on the inputs of a block's matrices, which update statistics while it runs.

Matrices that get the same tensor (query, key and value; gate and up) share one statistic, so that a Gram matrix,
and its inverse, is computed once for all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from spp.errors import SppError
from spp.models.architecture import Matrix
from spp.pruning.calibration.input_statistics import Statistic
from spp.runtime import distributed

Statistics = dict[type[Statistic], Statistic]
"""Kind -> the statistic of that kind over a matrix's inputs."""


def collect_statistics(
    matrices: Sequence[Matrix], kinds: Sequence[type[Statistic]], run: Callable[[], object]
) -> dict[str, Statistics]:
    """The statistics of every matrix's inputs, by the matrix's name.

    Args:
        matrices: of one block.
        kinds: which statistics.
        run: runs the block over all batches.
    """
    inputs = _Inputs(matrices, kinds)
    hooks = [
        matrix.owner.register_forward_pre_hook(partial(_see_first, inputs, matrix.name))
        for matrix in matrices
        if matrix.expert is None
    ]
    try:
        with _ExpertInputs(inputs, matrices):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return inputs.statistics()


class _Inputs:
    """The inputs that the matrices of a block get."""

    def __init__(self, matrices: Sequence[Matrix], kinds: Sequence[type[Statistic]]) -> None:
        self._own = {matrix.name: {kind: kind(matrix.weight.shape[1]) for kind in kinds} for matrix in matrices}
        # Those that get the inputs of another matrix, and that one.
        self._leaders: dict[str, str] = {}
        # The last input of those that have statistics of their own, if it is still there, and its version, which counts
        # changes in place.
        self._last: dict[str, tuple[weakref.ref[Tensor], int]] = {}

    def see(self, name: str, inputs: Tensor) -> None:
        """Add a batch of inputs (..., I) of one matrix to its statistics."""
        same = next((leader for leader, last in self._last.items() if _is_same(inputs, last)), None)
        if name in self._leaders:
            if same != self._leaders[name]:
                raise SppError(f"{name} does not always get the inputs of {self._leaders[name]}, as it did at first")
        elif same not in (None, name) and name not in self._last:
            assert same is not None
            self._leaders[name] = same
        else:
            for statistic in self._own[name].values():
                statistic.update(inputs)
            self._last[name] = weakref.ref(inputs), inputs._version

    def statistics(self) -> dict[str, Statistics]:
        """Statistics by the matrix's name; matrices that share them are the same in all processes."""
        for leaders in distributed.all_gather(self._leaders):
            self._leaders |= leaders
        return {name: self._own[self._leaders.get(name, name)] for name in self._own}


def _is_same(inputs: Tensor, last: tuple[weakref.ref[Tensor], int]) -> bool:
    return inputs is last[0]() and inputs._version == last[1]


def _see_first(inputs: _Inputs, name: str, _: Any, args: tuple[Tensor, ...]) -> None:
    """A hook on a linear layer, which has one argument."""
    inputs.see(name, args[0])


class _ExpertInputs(TorchFunctionMode):
    """While active, records the inputs of experts whose weights are slices of one parameter.

    These experts are not modules with hooks: transformers calls `linear(inputs, stack[expert])`.
    """

    def __init__(self, inputs: _Inputs, matrices: Sequence[Matrix]) -> None:
        super().__init__()
        self._inputs = inputs
        self._names: dict[tuple[int, Any], list[str]] = {}
        for matrix in matrices:
            if matrix.expert is not None:
                weight = matrix.owner.get_parameter(matrix.parameter)[matrix.expert]
                self._names.setdefault(_place(weight), []).append(matrix.name)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if self._names and func is F.linear and len(args) > 1:
            for name in self._names.get(_place(args[1]), ()):
                self._inputs.see(name, args[0])
        return func(*args, **(kwargs or {}))


def _place(tensor: Tensor) -> tuple[int, Any]:
    """Where a tensor begins in memory."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset()
