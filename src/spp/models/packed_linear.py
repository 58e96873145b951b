"""A linear layer that holds its sparse weight packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spp.errors import SppError
from spp.ops import packed_linear, unpack
from spp.ops.packed import PackedWeight, problems, unpack_mask


class PackedLinear(nn.Module):
    """y = x W^T + bias with W (O, I) packed, in the dtype of x.

    Its parameters are `values`, `bitmask` and `row_offsets` (see `spp.ops.packed.PackedWeight`), which get no gradient,
    and `bias`. They are parameters and not buffers so that distributed training neither copies them at every step nor
    asks for their gradients.

    Args:
        weight: (O, I).
        bias: (O,) or None.
        transposed: whether the layer that this one replaces stores its weight as (I, O), as Conv1D does.
    """

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None = None, *, transposed: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.transposed = transposed
        self.values = nn.Parameter(weight.values, requires_grad=False)
        self.bitmask = nn.Parameter(weight.bitmask, requires_grad=False)
        self.row_offsets = nn.Parameter(weight.row_offsets, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def packed(self) -> PackedWeight:
        """The weight (O, I); it shares the layer's memory."""
        return PackedWeight(self.values, self.bitmask, self.row_offsets, self.in_features)

    @property
    def weight(self) -> Tensor:
        """A dense copy of the weight, expanded at every access: (O, I), or (I, O) where `transposed`.

        Writing to the copy has no effect; `set_weight` changes the layer.
        """
        dense = unpack(self.packed)
        return dense.T if self.transposed else dense

    def set_weight(self, weight: Tensor) -> None:
        """Set the weight to a dense one of the same shape as `self.weight`, without changing which entries are stored.

        Raises:
            SppError: it is not zero where an entry is not stored; nothing is changed.
        """
        weight = weight.T if self.transposed else weight
        keep = unpack_mask(self.packed)
        if lost := int((weight[~keep] != 0).count_nonzero()):
            raise SppError(
                f"{lost} entries are not zero where the packed weight is; unpack the layer to change its zeros"
            )
        with torch.no_grad():
            self.values.copy_(weight[keep])

    def forward(self, x: Tensor) -> Tensor:
        """y (..., O), in x's dtype, for x (..., I)."""
        return packed_linear(x, self.packed, self._parameters["bias"])

    def extra_repr(self) -> str:
        zeros = 1 - self.values.numel() / (self.out_features * self.in_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, sparsity={zeros:.3f}"

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # A model of the same shape may have another number of values.
        given = state_dict.get(f"{prefix}values")
        if isinstance(given, Tensor) and given.ndim == 1 and given.shape != self.values.shape:
            self.values = nn.Parameter(self.values.new_empty(given.shape), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)
        error_messages: list[str] = args[-1]
        if given is not None and not error_messages and not self.values.is_meta:
            error_messages += [f"{prefix}: {problem}" for problem in problems(self.packed)]
