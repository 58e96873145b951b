"""Experts whose weights are stacked in one parameter, as transformers 5 stores most mixtures of experts.

A module of experts has a parameter for each of its layers (`gate_up_proj`, `down_proj`) with the matrices of all
experts. transformers' `use_experts_implementation` records on the module how they are stored, and chooses at each call
among implementations. All of them compute what the module's own forward computes, named `eager`: it multiplies the
inputs of one expert after the other by `parameter[expert]`.

Shapes: E experts, O output features, I input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from spp.ops.zeros import is_sparse


@dataclass(frozen=True)
class Stack:
    """A parameter that holds one matrix of every expert.

    Attributes:
        owner: the module of experts.
        parameter: its name there.
        transposed: whether it is stored as (E, I, O) instead of (E, O, I), as GPT-OSS does.
    """

    owner: nn.Module
    parameter: str
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """(E, O, I): the parameter, or a view of it."""
        stored = self.owner._parameters[self.parameter]
        assert stored is not None
        return stored.transpose(1, 2) if self.transposed else stored

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, O, I."""
        experts, out_features, in_features = self.weight.shape
        return experts, out_features, in_features


def stacks_of(module: nn.Module) -> dict[str, Stack]:
    """The stacks that are parameters of this module itself, by name; none if it is no module of experts."""
    if not (hasattr(module, "is_concatenated") and hasattr(type(module).forward, "__wrapped__")):
        return {}
    transposed = bool(getattr(module, "is_transposed", False))
    return {
        name: Stack(module, name, transposed)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


def stacks_in(model: nn.Module) -> dict[str, Stack]:
    """Full name -> stack, of all modules of experts in a model; adapters around them leave no trace in the names."""
    return {
        f"{name}.{parameter}".replace(".base_layer.", "."): stack
        for name, module in model.named_modules()
        for parameter, stack in stacks_of(module).items()
    }


def pruned_stacks(model: nn.Module) -> dict[str, Stack]:
    """The `stacks_in` a model that have zeros to keep; on the meta device, which has none, the (E, O, I) ones."""
    return {
        name: stack
        for name, stack in stacks_in(model).items()
        if (not stack.transposed if stack.weight.is_meta else is_sparse(list(stack.weight)))
    }


def trace_as_one_expert_(model: nn.Module) -> None:
    """Make every module of experts compute with its first expert for all tokens, for tracing without data, in place.

    What is computed means nothing, but its tensors are as large as those of all experts together, whatever the tokens'
    choice, which cannot be traced.
    """
    for module in model.modules():
        if stacks_of(module):
            module.forward = partial(_one_expert, module)


def _one_expert(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' output (T, H) for T tokens, each with k experts."""

    def layer(name: str, x: Tensor) -> Tensor:
        bias = getattr(experts, f"{name}_bias")[0] if experts.has_bias else None
        return F.linear(x, stacks[name].weight[0], bias)

    stacks = stacks_of(experts)
    count = top_k_index.shape[-1]
    inputs = hidden_states.repeat_interleave(count, dim=0)
    gate = experts._apply_gate if experts.has_gate else experts.act_fn
    inner = gate(layer("gate_up_proj" if experts.has_gate else "up_proj", inputs))
    outputs = layer("down_proj", inner) * top_k_weights.reshape(-1, 1)
    return outputs.reshape(len(hidden_states), count, -1).sum(dim=1).to(hidden_states.dtype)
