"""A model has the ratio that was asked for, however narrow its rows are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from spp import SppConfig
from spp.models.architecture import prunable_linears, weight_oi
from spp.ops.zero_proof import lost_zeros
from spp.patterns import Unstructured, detect_pattern, parse_pattern
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


@pytest.mark.parametrize("steps", [{"criterion": "sparsegpt"}, {"refine": "swaps", "update": "least-squares"}], ids=str)
@pytest.mark.parametrize("text", ["32:64", "16:64"])
def test_a_fixed_count_per_64_columns_is_pruned_and_trained_as_any_pattern(
    tiny_model: MakeModel, text: str, steps: dict[str, str]
) -> None:
    model, pattern = tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16), parse_pattern(text)
    tokens = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    prune_model(model, PruningSettings.build({"pattern": text, **steps}), tokens)
    before = {name: weight_oi(module).clone() for name, module in prunable_linears(model).items()}
    tuned = get_peft_model(model, SppConfig(target_modules="all-linear"))
    optimizer = torch.optim.SGD([one for one in tuned.parameters() if one.requires_grad], lr=0.1)
    tuned(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    merged = tuned.merge_and_unload()
    for name, module in prunable_linears(merged).items():
        weight = weight_oi(module)
        assert detect_pattern(weight) == Unstructured(pattern.sparsity), name
        assert pattern.violations(weight) == 0 and not weight.equal(before[name]), name
        assert lost_zeros(before[name], weight) == 0, name
