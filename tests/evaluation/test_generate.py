"""`spp generate`: the same text packed or not, what it measures, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from spp.checkpoints.options import PackOptions
from spp.errors import UsageError
from spp.evaluation.generate import generate
from spp.evaluation.options import GenerateOptions
from spp.pruning.options import PruneOptions
from spp.pruning.pack import pack
from spp.pruning.prune import prune
from spp.training.options import TrainOptions
from spp.training.train import train


@pytest.fixture
def pruned(tmp_path, tiny_checkpoint):
    prune(PruneOptions.build({"model": str(tiny_checkpoint), "out": tmp_path / "pruned", "criterion": "magnitude"}))
    return tmp_path / "pruned"


def generated(model, **changes):
    values = {"model": str(model), "prompt": "the cat ", "max_new_tokens": 12, "device": "cpu", **changes}
    return generate(GenerateOptions.build(values))


def test_the_text_is_that_of_plain_transformers_packed_or_not(pruned, tmp_path, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    ids = tiny_tokenizer("the cat ", return_tensors="pt").input_ids
    expected = tiny_tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :])
    pack(PackOptions(model=str(pruned), out=tmp_path / "archive"))
    reports = [
        generated(pruned, pack=False, dtype="float32"),
        generated(pruned, pack=True, dtype="float32"),
        generated(tmp_path / "archive", dtype="float32"),
    ]
    assert [report.text for report in reports] == [expected] * 3
    assert [report.packed for report in reports] == [0, 14, 14]
    assert reports[1].weight_bytes < reports[0].weight_bytes
    assert reports[0].prompt_tokens == ids.shape[1] and reports[0].new_tokens == 12
    assert reports[0].tokens_per_second > 0 and reports[0].prompt_seconds > 0


def test_the_checkpoints_dtype_is_the_default_and_an_adapter_changes_the_text(pruned, stories, tmp_path):
    values = {"model": str(pruned), "out": tmp_path / "adapter", "data": str(stories), "window": 48}
    train(TrainOptions.build({**values, "learning_rate": 0.3, "max_steps": 12, "r": 4}))
    bare, tuned = generated(pruned), generated(pruned, adapter=tmp_path / "adapter")
    assert bare.dtype == "bfloat16" and tuned.text != bare.text
    assert generated(pruned, adapter=tmp_path / "adapter", pack=False).text == tuned.text


def test_sampling_depends_on_the_seed_alone(pruned):
    one, same, other = (generated(pruned, temperature=2.0, seed=seed).text for seed in (1, 1, 2))
    assert one == same != other


def test_requests_that_cannot_be_met_are_refused(pruned, tmp_path, tiny_checkpoint):
    with pytest.raises(UsageError, match=r"9 tokens and --max-new-tokens 60 are more than the model's context of 64"):
        generated(pruned, max_new_tokens=60)
    with pytest.raises(UsageError, match=r"no adapter_config\.json"):
        generated(pruned, adapter=tmp_path)
    with pytest.raises(UsageError, match="Prune it first"):
        generated(tiny_checkpoint, pack=True)
    with pytest.raises(UsageError, match="prompt"):
        generated(pruned, prompt="")
