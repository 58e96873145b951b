"""Which weight matrices a checkpoint stores as (I, O): known from names, without building the model."""

from __future__ import annotations

from typing import Any

# Families whose projections are transformers' Conv1D, and the names of these projections.
_CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


def stores_transposed(model_type: Any, tensor_name: str) -> bool:
    """Whether a weight lies in the file as (I, O), input dimension first, instead of nn.Linear's (O, I)."""
    module = tensor_name.removesuffix(".weight").rpartition(".")[2]
    # A damaged config.json may have anything there.
    return isinstance(model_type, str) and model_type in _CONV1D_FAMILIES and module in _CONV1D_MODULES
