"""A model has the ratio that was asked for, however narrow its rows are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from spp.models.architecture import prunable_linears, weight_oi
from spp.pruning.in_memory import prune_model
from spp.pruning.options import PruningSettings

MakeModel = Callable[..., PreTrainedModel]


def zeros(model: PreTrainedModel, settings: dict[str, object]) -> dict[str, tuple[int, torch.Size]]:
    """Of a pruned copy: matrix -> its zeros, and its shape."""
    pruned = copy.deepcopy(model)
    tokens = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    prune_model(pruned, PruningSettings.build(settings), tokens)
    weights = {name: weight_oi(module) for name, module in prunable_linears(pruned).items()}
    return {name: (int((weight == 0).sum()), weight.shape) for name, weight in weights.items()}


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize("percent", [5, 90])
def test_every_matrix_has_the_ratio_to_within_a_weight(tiny_model: MakeModel, criterion: str, percent: int) -> None:
    for name, (count, shape) in zeros(tiny_model("llama"), {"pattern": f"{percent}%", "criterion": criterion}).items():
        assert count == shape.numel() * percent // 100, name


def test_the_published_count_is_reachable(tiny_model: MakeModel) -> None:
    settings = {"pattern": "5%", "criterion": "wanda", "equal_rows": True}
    for name, (count, (rows, columns)) in zeros(tiny_model("llama"), settings).items():
        assert count == rows * (columns * 5 // 100), name
