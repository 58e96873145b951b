"""Every family of docs/models.md from the dense model to the merged one, which loads without spp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES, WHOLE_MODELS, tiny_model_of, whole_model_of
from family_table import row_of, rows, skip_if_unknown
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast

from spp.adapters.attach import with_adapter
from spp.adapters.merge import merge
from spp.adapters.options import MergeOptions
from spp.adapters.spp_format import read_adapter
from spp.checkpoints.options import VerifyOptions
from spp.checkpoints.verify import verify
from spp.models.architecture import auto_class, decoder_blocks, prunable_linears
from spp.models.experts import stacks_in
from spp.models.loading import load_model
from spp.options import LoadingOptions
from spp.pruning.options import PruneOptions
from spp.pruning.prune import prune
from spp.training.options import TrainOptions
from spp.training.train import train

CPU = LoadingOptions.build({"device": "cpu"})


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 83).view(2, 40), use_cache=False).logits


def trained(pruned: Path, out: Path, stories: Path) -> Path:
    """An adapter for all layers, after two steps at a rate that shows in every weight."""
    data = {"data": str(stories), "window": 32, "max_steps": 2, "batch_size": 2, "learning_rate": 0.05}
    train(TrainOptions.build({"model": str(pruned), "out": out, "device": "cpu", **data}))
    return out


def loaded_without_spp(folder: Path) -> PreTrainedModel:
    kind = auto_class(AutoConfig.from_pretrained(folder))
    assert kind is not None
    return kind.from_pretrained(folder, dtype=torch.float32)


def live(dense: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast, stories: Path) -> set[str]:
    """Prune, train, merge and verify, and check what must be equal; returns the names of the adapted layers."""
    before, pruned, merged = folder / "dense", folder / "pruned", folder / "merged"
    dense.save_pretrained(before)
    tokenizer.save_pretrained(before)
    prune(PruneOptions.build({"model": str(before), "out": pruned, "criterion": "magnitude", "device": "cpu"}))
    adapter = trained(pruned, folder / "adapter", stories)
    factors = read_adapter(adapter).factors
    report = merge(MergeOptions.build({"model": str(pruned), "adapter": adapter, "out": merged}))
    assert len(report.tensors) >= len(factors)  # more, if the files hold a matrix in parts
    assert verify(VerifyOptions.build({"base": str(pruned), "other": str(merged), "pattern": "2:4"})).verified

    stock = loaded_without_spp(merged)
    adapted = logits(with_adapter(load_model(pruned, CPU), adapter))
    torch.testing.assert_close(logits(stock), adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, logits(loaded_without_spp(pruned)), atol=1e-4)
    assert not [name for name, one in factors.items() if not one.A.any()]
    assert set(factors) <= {*prunable_linears(stock), *stacks_in(stock)}
    return set(factors)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_pruned_trained_merged_and_verified_as_its_row_says(
    family: str,
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    stories: Path,
    record_property: Callable[[str, object], None],
) -> None:
    skip_if_unknown(family)
    model = tiny_model_of(family)
    found = row_of(model, live(model, tmp_path, tiny_tokenizer, stories))
    record_property("row", (family, *found))  # for scripts/family_table.py, which writes the page
    assert rows()[family] == found


@pytest.mark.parametrize("family", WHOLE_MODELS)
def test_a_published_model_that_takes_images_is_pruned_trained_merged_and_verified(
    family: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, stories: Path
) -> None:
    """Its vision tower is copied, also where only the language model is loaded."""
    skip_if_unknown(family)
    whole = whole_model_of(family)
    assert live(whole, tmp_path, tiny_tokenizer, stories)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    after = dict(merged.named_parameters())
    changed = {name for name, one in whole.named_parameters() if not one.equal(after[name])}
    prefix = decoder_blocks(whole)[0]
    assert changed and all(name.startswith(f"{prefix}.") for name in changed)
