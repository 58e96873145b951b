"""Experts whose weights are stacked in one parameter, as transformers 5 stores most mixtures of experts.

A module of experts has a parameter for each of its layers (`gate_up_proj`, `down_proj`) with the matrices of all
experts. transformers' `use_experts_implementation` records on the module how they are stored, and chooses at each call
among implementations. All of them compute what the module's own forward computes, named `eager`: it multiplies the
inputs of one expert after the other by `parameter[expert]`.

Shapes: E experts, O output features, I input features.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

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
