"""A linear layer with SPP adapters.

Shapes: T tokens, O output features, I input features, R row groups, K directions.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from spp.adapters.tuner.base_weight import dense, oriented, set_dense, stored, weight_to_compute_with
from spp.adapters.tuner.config import SppConfig
from spp.errors import SppError
from spp.models.architecture import shape_oi
from spp.models.packed_linear import PackedLinear
from spp.models.quantized import is_quantized
from spp.ops import Mode, adapter_linear, spp_linear
from spp.ops.reference import add_delta, delta_weight, fitting_groups, one_direction_each
from spp.ops.zero_proof import lost_zeros
from spp.ops.zeros import all_finite


class Factor(nn.Module):
    """A trained factor, A or B. It is a module, and is called to be read, so that offloading and sharding hooks run."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self) -> Tensor:
        """The factor itself."""
        return self.weight


class SppLayer(BaseTunerLayer):
    """What PEFT reads of a layer with SPP adapters: the names of its factors and of their settings."""

    adapter_layer_names = ("spp_A", "spp_B")
    other_param_names = ("r", "scale", "mode", "spp_dropout")

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        """The device and dtype that PEFT gives the factors; for these it would expand a packed layer's `weight`."""
        if isinstance(base_layer, PackedLinear):
            return base_layer.values.device, base_layer.values.dtype
        return super()._get_base_layer_device_and_dtype(base_layer)


class SppLinear(nn.Module, SppLayer):
    """An `nn.Linear`, `Conv1D` or `PackedLinear` with W' = W + s * W * (A[g] B) in place of W.

    A training step takes three GEMMs with one active adapter, four in split mode. With dropout, or n > 1 active
    adapters, it takes 2 + 3 n: the base layer's two, and three for each adapter.

    Args:
        base_layer: the layer to adapt.
        adapter_name: name of the first adapter.
        r: row groups of that adapter.
        config: its settings.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, r: int, config: SppConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = shape_oi(base_layer)
        self.r: dict[str, int] = {}
        self.scale: dict[str, float] = {}
        self.mode: dict[str, Mode] = {}
        self.spp_A = nn.ModuleDict()
        self.spp_B = nn.ModuleDict()
        self.spp_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        self._weight_before_merge: Tensor | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config)

    def update_layer(self, adapter_name: str, r: int, config: SppConfig) -> None:
        """Add an adapter, or replace the one of this name."""
        groups, directions = fitting_groups(self.out_features, r, config.directions)
        self.r[adapter_name] = groups
        self.scale[adapter_name] = config.scale
        self.mode[adapter_name] = config.mode
        self.spp_A[adapter_name] = Factor(groups * directions, self.in_features)
        self.spp_B[adapter_name] = Factor(self.out_features, directions)
        self.spp_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.reset_spp_parameters(adapter_name, init_weights=config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_spp_parameters(self, adapter_name: str, *, init_weights: bool | str) -> None:
        """Start at W' = W, unless `init_weights` is False; see `initialize`."""
        A, B, _ = self._factors(adapter_name)
        initialize(A.detach(), B.detach(), self.r[adapter_name], init_weights)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output (..., O) for x (..., I), with the active adapters unless they are disabled or merged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.spp_A]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) == 1 and not self._drops(active[0]):
            with weight_to_compute_with(self.get_base_layer(), x.dtype) as weight:
                factors = self._factors(active[0])
                return spp_linear(x, weight, *factors, self.bias, mode=self.mode[active[0]])
        result = self.base_layer(x, *args, **kwargs)
        with weight_to_compute_with(self.get_base_layer(), x.dtype) as weight:
            for name in active:
                dropped = self.spp_dropout[name](x)
                result = result + adapter_linear(dropped, weight, *self._factors(name)).to(result.dtype)
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Delta = s * W * (A[g] B) of the unmerged W, in W's own layout; fp32, or fp64 if W is."""
        base = self.get_base_layer()
        weight = oriented(base, dense(base, self._weight_before_merge))
        A, B, scale = self._factors(adapter)
        delta = delta_weight(weight, A.to(weight.device), B.to(weight.device), scale)
        return oriented(base, delta)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' Delta to W, rounded once; the zeros of W are proved to be +0.0 afterwards.

        A copy of W is kept on the CPU until `unmerge`: Delta depends on W, so subtracting it would not restore W.

        Args:
            safe_merge: raise, and change nothing, where the result has NaN or infinity.
            adapter_names: which adapters; None means the active ones.

        Raises:
            ValueError: `safe_merge`, and the result is not finite; or W is quantized.
            SppError: a zero was lost; nothing is changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spp_A]
        if not names:
            return
        base = self.get_base_layer()
        if is_quantized(base):
            raise ValueError(
                "the weight is quantized; merge into the model as it was before (spp merge MODEL ADAPTER OUT)"
            )
        with torch.no_grad():
            delta: Any = sum(self.get_delta_weight(name) for name in [*self.merged_adapters, *names])
            merged = merged_or_error(dense(base, self._weight_before_merge), delta, names, safe=safe_merge)
        if self._weight_before_merge is None:
            self._weight_before_merge = stored(base).detach().to("cpu", copy=True)
        set_dense(base, merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore W, bit for bit, as it was before the first merge."""
        if self._weight_before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        stored(self.get_base_layer()).data.copy_(self._weight_before_merge)
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: Delta is a product with W, of full rank."""
        return False

    def __repr__(self) -> str:
        return "spp." + super().__repr__()

    def _drops(self, adapter: str) -> bool:
        return self.training and cast(nn.Dropout, self.spp_dropout[adapter]).p > 0

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        return self.spp_A[adapter](), self.spp_B[adapter](), self.scale[adapter]


def initialize(A: Tensor, B: Tensor, groups: int, init_weights: bool | str) -> None:
    """Set factors to values with W' = W, unless `init_weights` is False.

    ones: A = 0, and each row of B has a single 1. So A, which is nearly all of the adapter, has its full gradient from
    the first step, and a learning rate changes weights by the same share whatever their number of columns. The rows of
    a group are divided into K equal parts, and those of part k have their 1 in column k: the adapter starts as one with
    K times as many groups of one direction each.
    published: A from U(-1/sqrt(I), 1/sqrt(I)), which is kaiming_uniform(a = sqrt(5)), and B = 0.

    Args:
        A: (R K, I), changed in place, without gradient.
        B: (O, K), likewise.
        groups: R.
        init_weights: ones (or True), published, or False for random factors.
    """
    if init_weights in (True, "ones"):
        nn.init.zeros_(A)
        B.copy_(one_direction_each(len(B), groups, B.shape[1], B.device))
        return
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if init_weights:
        nn.init.zeros_(B)
    else:
        nn.init.normal_(B)


def merged_or_error(before: Tensor, delta: Tensor, adapters: list[str], *, safe: bool) -> Tensor:
    """W + Delta, rounded once to W's dtype, with every zero of W proved to be +0.0.

    Raises:
        ValueError: `safe`, and the result is not finite.
        SppError: a zero was lost.
    """
    merged, names = add_delta(before, delta), ", ".join(adapters)
    if safe and not all_finite(merged):
        raise ValueError(f"NaNs detected in the merged weights. The adapter {names} seems to be broken")
    if lost := lost_zeros(before, merged):
        raise SppError(f"merging {names} would turn {lost} zeros of the weight into something else")
    return merged
