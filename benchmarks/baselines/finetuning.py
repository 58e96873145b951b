"""Other ways to fine-tune a pruned model that keep its zeros, one module in place of each linear layer.

Shapes: O output features, I input features, r rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from spp.adapters.tuner.ranks import like_lora
from spp.models.architecture import prunable_linears, weight_oi
from spp.ops.reference import delta_weight, fitting_groups, one_direction_each


class Replaced(nn.Module, ABC):
    """x W'^T + bias with a W' that follows from the frozen W and what is trained.

    Args:
        base: the linear layer that it stands for.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.register_buffer("W", weight_oi(base).detach())
        self.bias = base.bias

    @abstractmethod
    def weight(self) -> Tensor:
        """W', (O, I)."""

    def deployed(self) -> Tensor:
        """W' as it is after merging."""
        return self.weight()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        return F.linear(x, self.weight() if self.training else self.deployed(), self.bias)


class Lora(Replaced):
    """LoRA* of the SPP paper: W + s B A while training, dense; merged, and masked again, afterwards."""

    def __init__(self, base: nn.Module, rank: int = 16, scale: float = 2.0) -> None:
        super().__init__(base)
        out_features, in_features = self.W.shape
        bound = 1 / math.sqrt(in_features)
        self.A = nn.Parameter(torch.empty(rank, in_features).uniform_(-bound, bound).to(self.W.device))
        self.B = nn.Parameter(torch.zeros(out_features, rank, device=self.W.device))
        self._scale = scale

    def weight(self) -> Tensor:
        return self.W + self._scale * (self.B @ self.A)

    def deployed(self) -> Tensor:
        return torch.where(self.W == 0, 0.0, self.weight())


class MaskedLora(Lora):
    """SparsePEFT, MaskLoRA: W + mask * (s B A), in training too."""

    def weight(self) -> Tensor:
        return torch.where(self.W == 0, 0.0, super().weight())


class HalfSpp(MaskedLora):
    """Half SPP and half masked LoRA, of half the rank each: W + s W * (A[g] B) + mask * (s B A)."""

    def __init__(self, base: nn.Module, rank: int = 16, directions: int = 4) -> None:
        super().__init__(base, rank // 2)
        (rows, columns), device = self.W.shape, self.W.device
        groups = like_lora(rows, columns, directions, rank - rank // 2)
        groups, directions = fitting_groups(rows, groups, directions)
        self.factor = nn.Parameter(torch.zeros(groups * directions, columns, device=device))
        self.shares = nn.Parameter(one_direction_each(rows, groups, directions, device).float())

    def weight(self) -> Tensor:
        return super().weight() + delta_weight(self.W, self.factor, self.shares, self._scale)


class MaskedWeight(Replaced):
    """Full fine-tuning of all weights that are not zero: more parameters than any adapter, the upper bound."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.V = nn.Parameter(self.W.to(torch.float32, copy=True))  # in bf16 most steps would round to nothing

    def weight(self) -> Tensor:
        return torch.where(self.W == 0, 0.0, self.V)


def replace_linears(model: PreTrainedModel, make: Callable[[nn.Module], Replaced]) -> PreTrainedModel:
    """Put a module in the place of every linear layer in the decoder blocks, and freeze everything else; the model."""
    model.requires_grad_(False)
    for name, layer in prunable_linears(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(layer))
    return model
