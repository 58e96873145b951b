"""Every family of docs/models.md through the prune stage: zeros, names and bits in the files, sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import naive_pruning as naive
import pytest
import torch
from families import FAMILIES, tiny_model_of
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from spp.checkpoints.checkpoint import Checkpoint
from spp.data.calibration import calibration_windows
from spp.models.architecture import Matrix, decoder_blocks, prunable_matrices
from spp.models.loading import load_model
from spp.patterns import NM
from spp.pruning.options import PruneOptions
from spp.pruning.prune import PruneReport, prune

Pruned = tuple[Path, PruneReport]


@pytest.fixture
def pruned(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, stories: Path) -> Callable[..., Pruned]:
    """Save a tiny model of a family and prune it; the folder before, and the report."""

    def make(family: str, **changes: Any) -> Pruned:
        dense = tmp_path / "dense"
        tiny_model_of(family).save_pretrained(dense)
        tiny_tokenizer.save_pretrained(dense)
        asked = {"model": str(dense), "out": tmp_path / "pruned", "calibration": str(stories), "device": "cpu"}
        sizes = {"samples": 24, "window": 32, "min_expert_tokens": 0}
        return dense, prune(PruneOptions.build({**asked, **sizes, **changes}))

    return make


def loaded(folder: Path) -> PreTrainedModel:
    return load_model(folder, PruneOptions.build({"model": str(folder), "out": "-", "device": "cpu"}))


def matrices(model: PreTrainedModel, index: int) -> dict[str, Matrix]:
    prefix, blocks = decoder_blocks(model)
    return {matrix.name: matrix for matrix in prunable_matrices(f"{prefix}.{index}", blocks[index])}


def inputs(
    model: PreTrainedModel, wanted: dict[str, Matrix], tokens: Tensor, patch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """What each matrix is multiplied with when the whole model runs, (T, I)."""
    seen: dict[str, list[Tensor]] = {}
    experts: dict[int, list[str]] = {}
    hooks = []
    for name, matrix in wanted.items():
        if matrix.expert is None:
            hook = partial(_note, seen, [name])
            hooks.append(matrix.owner.register_forward_pre_hook(lambda _, args, hook=hook: hook(args[0])))
        else:  # gate_proj and up_proj are multiplied together
            experts.setdefault(getattr(matrix.owner, matrix.parameter)[matrix.expert].data_ptr(), []).append(name)
    linear = nn.functional.linear

    def noted(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        _note(seen, experts.get(weight.data_ptr(), []), x)
        return linear(x, weight, *bias)

    with patch.context() as patched:
        if experts:
            patched.setattr(nn.functional, "linear", noted)
        for batch in tokens.split(8):
            model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _note(seen: dict[str, list[Tensor]], names: list[str], x: Tensor) -> None:
    for name in names:
        seen.setdefault(name, []).append(x.flatten(0, -2))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_family(
    family: str,
    pruned: Callable[..., Pruned],
    stories: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, report = pruned(family)
    before, after = dict(Checkpoint.open(dense).items()), dict(Checkpoint.open(report.out).items())
    assert {name: (one.shape, one.dtype) for name, one in before.items()} == {
        name: (one.shape, one.dtype) for name, one in after.items()
    }
    for name, tensor in after.items():
        if name in report.tensors:
            assert report.tensors[name].sparsity == 0.5, name
            assert tensor[tensor != 0].equal(before[name][tensor != 0]), name
        else:
            assert tensor.equal(before[name]), name

    # The file loads, and every matrix of every block obeys the pattern.
    model = loaded(report.out)
    model.set_experts_implementation("eager")
    last = len(decoder_blocks(model)[1]) - 1
    masks = {name: one.weight != 0 for index in range(last + 1) for name, one in matrices(model, index).items()}
    assert all(NM(2, 4).violations(mask.float()) == 0 for mask in masks.values())

    # Its last block was calibrated on what the pruned blocks before it give, and on its own dense outputs.
    dense_model = loaded(dense)
    decoder_blocks(model)[1][last].load_state_dict(decoder_blocks(dense_model)[1][last].state_dict())
    wanted = matrices(model, last)
    tokenizer = AutoTokenizer.from_pretrained(dense)  # of some families not the one that was saved
    tokens = calibration_windows(tokenizer, str(stories), samples=24, window=32, seed=0).windows
    seen = inputs(model, wanted, tokens, monkeypatch)
    assert wanted.keys() - seen.keys() == set(report.by_magnitude) & wanted.keys()
    for name, matrix in wanted.items():
        x = seen.get(name)
        expected = naive.magnitude(matrix.weight, NM(2, 4)) if x is None else naive.wanda(matrix.weight, x, NM(2, 4))
        assert expected.eq(masks[name]).double().mean() >= 0.999, name  # equal but for a tie in the last bit


def test_experts_that_see_few_tokens_fall_back(pruned: Callable[..., Pruned]) -> None:
    dense, report = pruned("mixtral", min_expert_tokens=10**6)
    assert report.expert_tokens
    assert sorted(report.by_magnitude) == sorted(report.expert_tokens)
    model, after = loaded(dense), loaded(report.out)
    for name, matrix in matrices(model, 0).items():
        if matrix.expert is not None:
            assert (matrices(after, 0)[name].weight != 0).equal(naive.magnitude(matrix.weight, NM(2, 4)))


def test_tokens_of_experts_are_counted(pruned: Callable[..., Pruned]) -> None:
    _, report = pruned("mixtral")
    config = FAMILIES["mixtral"]
    assert report.by_magnitude == []
    for block in range(config["num_hidden_layers"]):
        counts = {
            name: tokens
            for name, tokens in report.expert_tokens.items()
            if f"layers.{block}." in name and "down_proj" in name
        }
        assert len(counts) == config["num_local_experts"]
        assert sum(counts.values()) == 24 * 32 * config.get("num_experts_per_tok", 2)
