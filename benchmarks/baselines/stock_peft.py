"""PEFT's own adapters on a single linear layer, as a user of PEFT gets them."""

from __future__ import annotations

import torch
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

RANK = 16


def lora(weight: Tensor) -> PeftModel:
    """x W^T + (alpha / r) x A^T B^T with r = 16."""
    return _adapted(weight, LoraConfig(r=RANK, target_modules=["linear"]))


def hira(weight: Tensor) -> PeftModel:
    """x W^T + x (W * (B A))^T with r = 16: the adapter of PEFT that keeps zeros, and the nearest relative of SPP."""
    return _adapted(weight, HiraConfig(r=RANK, target_modules=["linear"]))


def _adapted(weight: Tensor, config: LoraConfig | HiraConfig) -> PeftModel:
    """A model of one linear layer that shares the memory of `weight` (O, I), with the adapter on it."""
    out_features, in_features = weight.shape
    model = nn.Sequential()
    model.add_module("linear", nn.Linear(in_features, out_features, bias=False, device="meta"))
    model.linear.weight = nn.Parameter(weight, requires_grad=False)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in trained(adapted):
            if not parameter.any():  # a B of zeros makes gradients of zeros
                nn.init.normal_(parameter, std=0.02)
    return adapted


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that get a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
