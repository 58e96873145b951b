"""SPP adapters on experts whose weights are stacked in one parameter: factors of their own for every expert.

    W'[e] = W[e] + s * W[e] * (A[e][g] B[e])        for every expert e and each of its matrices

The model's own code of the experts runs, but for it a stand-in takes the parameter's place. `linear(x, stand_in[e])`
and `x @ stand_in[e]` are then the operator with the factors of expert e. So no W' outlives its own product, and
autograd saves none.

Shapes: E experts, O output features, I input features, R row groups, K directions.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from spp.adapters.tuner.base_weight import onloaded
from spp.adapters.tuner.config import SppConfig
from spp.adapters.tuner.layer import Factor, SppLayer, initialize, merged_or_error
from spp.errors import SppError
from spp.models.experts import Stack, stacks_of
from spp.ops import Mode, adapter_linear, spp_linear
from spp.ops.reference import delta_weight, fitting_groups

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class SppExperts(nn.Module, SppLayer):
    """A module of experts with adapters on some of its stacks.

    The factors are (E, R K, I) and (E, O, K), in one parameter for each stack.

    Args:
        base_layer: the module of experts.
        adapter_name: name of the first adapter.
        ranks: row groups of that adapter, by the name of the stack in the module.
        config: its settings.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, ranks: Mapping[str, int], config: SppConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r: dict[str, dict[str, int]] = {}
        self.scale: dict[str, float] = {}
        self.mode: dict[str, Mode] = {}
        self.spp_A = nn.ModuleDict()
        self.spp_B = nn.ModuleDict()
        self.spp_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        self._weights_before_merge: dict[str, Tensor] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, ranks, config)

    @property
    def stacks(self) -> dict[str, Stack]:
        """Name of each stack of the experts -> the stack."""
        return stacks_of(self.get_base_layer())

    def adapts(self, stack: str) -> bool:
        """Whether any adapter is on this stack."""
        return any(stack in groups for groups in self.r.values())

    def update_layer(self, adapter_name: str, ranks: Mapping[str, int], config: SppConfig) -> None:
        """Add an adapter, or replace the one of this name."""
        A, B, groups = nn.ModuleDict(), nn.ModuleDict(), {}
        for name, rank in ranks.items():
            experts, out_features, in_features = self.stacks[name].shape
            groups[name], directions = fitting_groups(out_features, rank, config.directions)
            A[name] = Factor(experts, groups[name] * directions, in_features)
            B[name] = Factor(experts, out_features, directions)
        self.r[adapter_name] = groups
        self.scale[adapter_name] = config.scale
        self.mode[adapter_name] = config.mode
        self.spp_A[adapter_name], self.spp_B[adapter_name] = A, B
        self.spp_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.reset_spp_parameters(adapter_name, init_weights=config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_spp_parameters(self, adapter_name: str, *, init_weights: bool | str) -> None:
        """As for a linear layer, expert by expert."""
        for name, groups in self.r[adapter_name].items():
            for A, B in zip(*(one.detach() for one in self._factors(adapter_name, name)), strict=True):
                initialize(A, B, groups, init_weights)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the experts, with the active adapters unless they are disabled or merged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.spp_A]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(*args, **kwargs)
        return self._adapted(active, *args, **kwargs)  # pyright: ignore[reportCallIssue, reportArgumentType]

    @torch.compiler.disable  # which experts are called, and on how many tokens, is different in each call
    def _adapted(self, active: list[str], *args: Any, **kwargs: Any) -> Any:
        base = self.get_base_layer()
        adapted = {name: _AdaptedStack(stack, self._applied(active, name)) for name, stack in self.stacks.items()}
        with onloaded(base), _eager(base, {name: stack for name, stack in adapted.items() if stack.applied}):
            return type(base).forward(base, *args, **kwargs)

    def get_delta_weights(self, adapter: str) -> dict[str, Tensor]:
        """Stack -> Delta of its unmerged W, in the stack's own layout; fp32, or fp64 if W is."""
        return {name: self._delta([adapter], name) for name in self.r[adapter]}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As for a linear layer, for all stacks or none."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spp_A]
        if not names:
            return
        everyone = [*self.merged_adapters, *names]
        with torch.no_grad():
            merged = {
                stack: merged_or_error(self._unmerged(stack), self._delta(everyone, stack), names, safe=safe_merge)
                for stack in self.stacks
                if any(stack in self.r[name] for name in everyone)
            }
        for stack, weight in merged.items():
            stored = self.get_base_layer().get_parameter(stack)
            self._weights_before_merge.setdefault(stack, stored.detach().to("cpu", copy=True))
            stored.data.copy_(weight)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the weights, bit for bit, as they were before the first merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for stack, weight in self._weights_before_merge.items():
            self.get_base_layer().get_parameter(stack).data.copy_(weight)
        self._weights_before_merge.clear()
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False, as for a linear layer."""
        return False

    def __repr__(self) -> str:
        return "spp." + super().__repr__()

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        stored = next(iter(stacks_of(base_layer).values())).weight
        return stored.device, stored.dtype

    def _factors(self, adapter: str, stack: str) -> tuple[Tensor, Tensor]:
        both = (cast(nn.ModuleDict, factor[adapter])[stack]() for factor in (self.spp_A, self.spp_B))
        A, B = both
        return A, B

    def _unmerged(self, stack: str) -> Tensor:
        now = self.get_base_layer().get_parameter(stack).detach()
        before = self._weights_before_merge.get(stack)
        return now if before is None else before.to(now.device)

    def _delta(self, adapters: list[str], stack: str) -> Tensor:
        """The sum of some adapters' Delta, in the stack's own layout."""
        transposed = self.stacks[stack].transposed
        weight = self._unmerged(stack)
        deltas = [
            torch.stack(
                [
                    delta_weight(one, A, B, self.scale[adapter])
                    for one, A, B in zip(
                        weight.mT if transposed else weight,
                        *(factor.to(weight.device) for factor in self._factors(adapter, stack)),
                        strict=True,
                    )
                ]
            )
            for adapter in adapters
            if stack in self.r[adapter]
        ]
        delta = sum(deltas[1:], start=deltas[0])
        return delta.mT if transposed else delta

    def _applied(self, adapters: list[str], stack: str) -> list[_Applied]:
        """What is applied to a stack in a forward."""
        return [
            _Applied.of(*self._factors(name, stack), self.scale[name], self.mode[name], self.spp_dropout[name])
            for name in adapters
            if stack in self.r[name]
        ]


@dataclass(frozen=True)
class _Applied:
    """One adapter on one stack: A and B of every expert, scale, mode and dropout."""

    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    scale: float
    mode: Mode
    dropout: nn.Module

    @classmethod
    def of(cls, A: Tensor, B: Tensor, scale: float, mode: Mode, dropout: nn.Module) -> _Applied:
        """Of the factors of a stack, which are unbound at once: a gradient of all is not filled for each expert."""
        return cls(A.unbind(), B.unbind(), scale, mode, dropout)

    @property
    def drops(self) -> bool:
        """Whether dropout is at work."""
        return self.dropout.training and cast(nn.Dropout, self.dropout).p > 0


class _AdaptedStack:
    """What the code of the experts sees in the place of the parameter."""

    def __init__(self, stack: Stack, applied: list[_Applied]) -> None:
        self._stack, self.applied = stack, applied

    def __getitem__(self, expert: Any) -> _AdaptedMatrix:
        index = int(expert)
        return _AdaptedMatrix(lambda x: self._product(index, x), transposed=self._stack.transposed)

    def __getattr__(self, name: str) -> Any:
        """Its dtype, device and shape are those of the parameter."""
        return getattr(self._stack.owner._parameters[self._stack.parameter], name)

    def _product(self, expert: int, x: Tensor) -> Tensor:
        """x W'[e]^T for the inputs (T, I) of one expert."""
        weight = self._stack.weight[expert]
        first = self.applied[0]
        if len(self.applied) == 1 and not first.drops:
            return spp_linear(x, weight, first.A[expert], first.B[expert], first.scale, mode=first.mode)
        result = F.linear(x, weight)
        for one in self.applied:
            delta = adapter_linear(one.dropout(x), weight, one.A[expert], one.B[expert], one.scale)
            result = result + delta.to(result.dtype)
        return result


class _AdaptedMatrix:
    """W' of one expert, which knows only how to be multiplied with."""

    def __init__(self, product: Callable[[Tensor], Tensor], *, transposed: bool) -> None:
        self._product, self._transposed = product, transposed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Tensor:
        x, matrix, *more = args
        bias = (kwargs or {}).get("bias", more[0] if more else None)
        expected = isinstance(matrix, cls) and (func in _PRODUCTS if matrix._transposed else func is F.linear)
        if not expected:
            name = getattr(func, "__name__", func)
            raise SppError(
                f"these experts use their weights in a way that SPP does not know ({name}); leave their stacks out of "
                "target_parameters"
            )
        result = matrix._product(x)
        return result if bias is None else result + bias


@contextmanager
def _eager(base: nn.Module, instead: Mapping[str, Any]) -> Iterator[None]:
    """A context manager in which a module of experts computes with its own code, and with stand-ins for its stacks.

    An attribute of an instance comes before its parameter of the same name, so the parameters stay where they are.
    """
    config = base.config
    eager: Any = copy.copy(config)
    eager._experts_implementation_internal = "eager"
    base.__dict__.update({**instead, "config": eager})
    try:
        yield
    finally:
        for name in instead:
            del base.__dict__[name]
        base.__dict__["config"] = config
