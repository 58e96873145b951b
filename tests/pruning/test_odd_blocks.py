"""Blocks that share more than hidden states, return lists, or are skipped, and layers whose inputs nobody sees."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model_of, whole_model_of
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from spp.checkpoints.options import VerifyOptions
from spp.checkpoints.verify import verify
from spp.errors import SppError, UsageError
from spp.models.blockwise.hidden_states import FolderStates, State, StatesWriter
from spp.pruning.memory_estimate import predict_pruning
from spp.pruning.options import PruneOptions
from spp.pruning.prune import PruneReport, prune
from spp.pruning.pruned_blocks import PrunedBlocks

SHARED = ["gemma4_text-shared", "gemma3n_text"]
Asked = Callable[..., PruneOptions]


@pytest.fixture
def asked(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, stories: Path) -> Asked:
    """Save a model, unless it is there, and ask for it to be pruned on several batches."""

    def make(model: PreTrainedModel | Path, out: str = "pruned", **changes: Any) -> PruneOptions:
        folder = model if isinstance(model, Path) else tmp_path / "dense"
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
        asked = {"model": str(folder), "out": tmp_path / out, "calibration": str(stories), "device": "cpu"}
        return PruneOptions.build({**asked, "samples": 80, "window": 32, "min_expert_tokens": 0, **changes})

    return make


def pruned_names(report: PruneReport) -> set[str]:
    return {name.removesuffix(".weight").rpartition(".")[2] for name in report.tensors}


def interrupt(at: int, patch: pytest.MonkeyPatch) -> None:
    keep = PrunedBlocks.keep

    def failing(self: PrunedBlocks, index: int) -> Any:
        if index == at:
            raise KeyboardInterrupt
        return keep(self, index)

    patch.setattr(PrunedBlocks, "keep", failing)


@pytest.mark.parametrize(
    "settings", [{}, {"reconstruct": "block", "reconstruct_epochs": 1}], ids=["wanda", "reconstruct"]
)
@pytest.mark.parametrize("family", SHARED)
def test_shared_keys_and_values_survive_an_interruption(
    family: str, settings: dict[str, Any], asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third and fourth block get keys and values from the first two, which a resumed run does not run again."""
    whole = prune(asked(tiny_model_of(family), "whole", **settings))
    options = asked(Path(whole.out.parent / "dense"), **settings)
    for block in (2, 3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(block, patch)
            prune(options)
    again = prune(options)
    before, after = (load_file(report.out / "model.safetensors") for report in (whole, again))
    assert all(tensor.equal(after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("family", SHARED)
def test_nothing_is_left_to_reconstruct_where_nothing_is_removed(family: str, asked: Asked) -> None:
    """Of a model that obeys the pattern, the dense and the pruned stream are the same, shared values as well."""
    sparse = prune(asked(tiny_model_of(family), "sparse", criterion="magnitude")).out
    options = asked(sparse, "again", reconstruct="block", reconstruct_epochs=1)
    report = prune(options)
    errors = {block: fits["block"].before for block, fits in report.reconstruction.items()}
    assert len(errors) == 4
    assert max(errors.values()) < 1e-6, errors


def test_the_memory_of_a_block_that_needs_what_others_left_is_predicted(asked: Asked) -> None:
    """The heaviest block is one that shares."""
    options = asked(tiny_model_of("gemma4_text-shared"), reconstruct="block")
    assert predict_pruning(options).parts


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    keys = torch.arange(24.0).view(2, 3, 4).transpose(1, 2)
    carried = {"shared": {3: (keys, keys), "full": [None, 1.5, True, "text", torch.ones(2, dtype=torch.bfloat16)]}}
    states = FolderStates(tmp_path, StatesWriter())
    states[0] = State(torch.ones(2, 2), carried)
    states[1] = State(torch.zeros(2, 2))
    assert states[0].hidden.equal(torch.ones(2, 2))
    assert states[1].carried == {}
    back = states[0].carried["shared"]
    assert list(back) == [3, "full"]
    assert all(isinstance(one, Tensor) and one.equal(keys) for one in back[3])
    assert back["full"][:4] == [None, 1.5, True, "text"]
    assert back["full"][4].dtype == torch.bfloat16
    with pytest.raises(SppError, match="passes a object on to later blocks"):
        states[2] = State(torch.zeros(2), {"shared": {0: object()}})


@pytest.mark.parametrize("family", ["openai-gpt", "xlnet", "idefics3"])
def test_lists_contexts_without_limit_and_embeddings_sent_to_the_model(family: str, asked: Asked) -> None:
    report = prune(asked(tiny_model_of(family)))
    assert {one.sparsity for one in report.tensors.values()} == {0.5}


def test_a_block_that_text_does_not_reach_stays_dense(asked: Asked, caplog: pytest.LogCaptureFixture) -> None:
    whole = whole_model_of("mllama")
    with caplog.at_level(logging.WARNING, "spp"):
        report = prune(asked(whole))
    assert "does not call its block on text" in caplog.text
    assert {one.sparsity for one in report.tensors.values()} == {0.5}
    assert {name.partition("layers.")[2][0] for name in report.tensors} == {"0", "2"}
    before, after = (load_file(folder / "model.safetensors") for folder in (report.out.parent / "dense", report.out))
    assert all(tensor.equal(after[name]) for name, tensor in before.items() if name not in report.tensors)


def test_a_first_block_that_text_does_not_reach_stays_dense(asked: Asked) -> None:
    """The form of what blocks return is seen at the first one that is called."""
    report = prune(asked(whole_model_of("mllama", cross_attention_layers=[0])))
    assert {name.partition("layers.")[2][0] for name in report.tensors} == {"1", "2"}


def test_a_last_block_that_text_does_not_reach_stays_dense(asked: Asked) -> None:
    whole = whole_model_of("mllama", cross_attention_layers=[2])
    report = prune(asked(whole, reconstruct="block", reconstruct_epochs=1))
    assert {name.partition("layers.")[2][0] for name in report.tensors} == {"0", "1"}
    assert set(report.reconstruction) == {"model.layers.0", "model.layers.1"}


@pytest.mark.parametrize(
    ("family", "layer", "dense", "pruned"),
    [
        ("mamba", "dt_proj", "dt_proj", "out_proj"),
        ("jamba", "dt_proj", "dt_proj", "out_proj"),
        ("deepseek_v4", "o_a_proj", "wo_a", "wo_b"),  # as the files name them
    ],
)
def test_layers_whose_inputs_calibration_does_not_see_stay_dense(
    family: str, layer: str, dense: str, pruned: str, asked: Asked, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "spp"):
        report = prune(asked(tiny_model_of(family), "calibrated"))
    assert layer in caplog.text
    assert dense not in pruned_names(report)
    assert pruned in pruned_names(report)
    assert {one.sparsity for one in report.tensors.values()} == {0.5}
    assert verify(VerifyOptions.build({"base": str(report.out), "other": str(report.out), "pattern": "2:4"})).verified
    by_magnitude = prune(asked(report.out.parent / "dense", "by_magnitude", criterion="magnitude"))
    assert {dense, pruned} <= pruned_names(by_magnitude)


def test_blocks_that_share_weights_are_refused(asked: Asked) -> None:
    with pytest.raises(UsageError, match=r"layers\.2 shares .* with model\.layers\.1"):
        prune(asked(tiny_model_of("zamba2"), criterion="magnitude"))
