"""Merging adapters with weights that were trained whole: heads, embeddings and rows of them, tied or not."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from spp import SppConfig
from spp.adapters import merge as merge_stage
from spp.adapters.attach import with_adapter
from spp.adapters.convert import convert
from spp.adapters.merge import MergeReport, merge
from spp.adapters.options import ConvertOptions, MergeOptions
from spp.adapters.spp_format import read_adapter
from spp.checkpoints.checkpoint import MANIFEST, VERIFICATION, Checkpoint
from spp.checkpoints.json_files import read_json, write_json
from spp.checkpoints.options import VerifyOptions
from spp.checkpoints.verify import verify
from spp.cli.entry_point import main
from spp.errors import SppError, UsageError
from spp.models.loading import load_model
from spp.models.weight_names import WeightNames
from spp.options import LoadingOptions

IDS = torch.arange(4, 68).view(2, 32)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CPU = LoadingOptions.build({"device": "cpu"})


@pytest.fixture
def base(tmp_path, tiny_model):
    """Write a tiny 50 % sparse Llama; `base(tie_word_embeddings=True)`."""

    def make(**changes) -> Path:
        model = tiny_model("llama", **changes)
        for module in model.base_model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data[:, ::2] = 0
        model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
        return tmp_path / "base"

    return make


def trained(base: Path, folder: Path, **settings) -> Tensor:
    """Save an adapter of which everything trained is random; returns the logits with it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with pytest.warns() if model.all_tied_weights_keys and "modules_to_save" in settings else nullcontext():
        config = SppConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **settings)
        adapted = get_peft_model(model, config)
    for index, parameter in enumerate(one for one in adapted.parameters() if one.requires_grad):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.2
    adapted.save_pretrained(str(folder))
    return logits(adapted)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def merged(base: Path, adapter: Path, **changes) -> MergeReport:
    out = adapter.with_name("merged")
    return merge(MergeOptions.build({"model": str(base), "adapter": adapter, "out": out} | changes))


def reloaded(folder: Path) -> nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


@pytest.mark.parametrize(
    ("tied", "settings", "replaced"),
    [
        (False, {"modules_to_save": ["lm_head"]}, [HEAD]),
        (False, {"modules_to_save": ["lm_head", "embed_tokens"]}, [HEAD, EMBEDDING]),
        (True, {"modules_to_save": ["lm_head"]}, [HEAD]),
        (True, {"modules_to_save": ["embed_tokens"]}, [HEAD, EMBEDDING]),
        (True, {"modules_to_save": ["lm_head", "embed_tokens"]}, [HEAD, EMBEDDING]),
        (True, {"trainable_token_indices": [3, 50]}, [EMBEDDING]),
        (False, {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [5, 4]}}, [HEAD, EMBEDDING]),
        (False, {"modules_to_save": ["input_layernorm"]}, [f"model.layers.{i}.input_layernorm.weight" for i in (0, 1)]),
    ],
)
def test_the_merged_model_computes_what_the_adapter_did(base, tmp_path, tied, settings, replaced, capsys):
    folder, adapter = base(tie_word_embeddings=tied), tmp_path / "adapter"
    expected = trained(folder, adapter, **settings)
    attached = with_adapter(load_model(folder, CPU), adapter)  # as spp eval and generate do
    torch.testing.assert_close(logits(attached), expected, rtol=1e-4, atol=1e-5)

    report = merged(folder, adapter)
    out = tmp_path / "merged"
    model = reloaded(out)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert report.replaced == replaced and not set(report.tensors) & set(replaced)
    unties = tied and "modules_to_save" in settings
    assert read_json(out / "config.json")["tie_word_embeddings"] is (tied and not unties)
    assert read_json(out / MANIFEST)["replaced"] == read_json(out / VERIFICATION)["replaced"] == replaced
    if tied and settings == {"modules_to_save": ["embed_tokens"]}:  # the head stays what the embedding was
        assert model.lm_head.weight.equal(Checkpoint.open(folder).tensor(EMBEDDING))
    proof = read_json(out / VERIFICATION)
    assert proof["copied"] + len(proof["tensors"]) + len(replaced) == len(Checkpoint.open(out).names)

    beside = verify(VerifyOptions.build({"base": str(folder), "other": str(out)}))
    assert beside.verified and beside.replaced == replaced
    by_record = VerifyOptions.build({"base": str(out), "record": out / VERIFICATION})
    assert verify(by_record).verified and verify(by_record).replaced == replaced
    assert main(["verify", str(folder), str(out)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"not proved: {len(replaced)} tensors that were trained whole" in said and replaced[0] in said


def test_head_and_embedding_that_stayed_the_same_stay_tied(base, tmp_path):
    folder, adapter = base(tie_word_embeddings=True), tmp_path / "adapter"
    trained(folder, adapter, modules_to_save=["lm_head", "embed_tokens"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"base_model.model.{HEAD}"] = tensors[f"base_model.model.{EMBEDDING}"].clone()
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert merged(folder, adapter).replaced == [EMBEDDING]
    assert read_json(tmp_path / "merged" / "config.json")["tie_word_embeddings"] is True
    assert reloaded(tmp_path / "merged").lm_head.weight.equal(tensors[f"base_model.model.{HEAD}"])


def test_an_untied_head_has_the_dtype_of_the_result_and_is_resumed_to_the_same_bits(base, tmp_path, monkeypatch):
    folder, adapter = base(tie_word_embeddings=True), tmp_path / "adapter"
    trained(folder, adapter, modules_to_save=["lm_head"])
    merged(folder, adapter, dtype="bfloat16")
    whole = {name: tensor.clone() for name, tensor in Checkpoint.open(tmp_path / "merged").items()}
    assert {one.dtype for one in whole.values()} == {torch.bfloat16}
    monkeypatch.setattr(merge_stage, "_AT_ONCE", 1)
    monkeypatch.setattr(merge_stage.MergeRecord, "save", _killed_after(6))
    with pytest.raises(KeyboardInterrupt):
        merged(folder, adapter, dtype="bfloat16", out=tmp_path / "again")
    monkeypatch.undo()
    merged(folder, adapter, dtype="bfloat16", out=tmp_path / "again")
    assert all(tensor.equal(whole[name]) for name, tensor in Checkpoint.open(tmp_path / "again").items())


def _killed_after(saves: int):
    save, seen = merge_stage.MergeRecord.save, []

    def once_too_often(record):
        save(record)
        seen.append(record)
        if len(seen) == saves:
            raise KeyboardInterrupt

    return once_too_often


def edited(adapter: Path, **tensors: Tensor) -> None:
    path = adapter / "adapter_model.safetensors"
    named = {f"base_model.model.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}
    save_file(load_file(path) | named, path)


def test_what_does_not_fit_is_refused_with_the_remedy(base, tmp_path):
    folder, adapter = base(tie_word_embeddings=True), tmp_path / "adapter"
    trained(folder, adapter, modules_to_save=["lm_head"])
    edited(adapter, lm_head__weight=torch.ones(99, 32))
    with pytest.raises(SppError, match=r"lm_head.weight is \(96, 32\), the adapter's \(99, 32\).*resize_token"):
        merged(folder, adapter)
    edited(adapter, lm_head__weight=torch.full((96, 32), torch.nan))
    with pytest.raises(SppError, match="lm_head.weight, which was trained whole, holds NaN"):
        merged(folder, adapter)
    edited(adapter, lm_head__weight=torch.ones(96, 32), score__weight=torch.ones(2, 32))
    settings = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", settings | {"modules_to_save": ["lm_head", "score"]})
    with pytest.raises(SppError, match="no tensor for score.weight, which was trained whole; PEFT can merge it"):
        merged(folder, adapter)
    assert not (tmp_path / "merged").exists()


def test_rows_that_the_settings_do_not_name_or_the_model_lacks_are_refused(base, tmp_path):
    folder, adapter = base(), tmp_path / "adapter"
    trained(folder, adapter, trainable_token_indices=[3, 50])
    settings = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", settings | {"trainable_token_indices": [3]})
    with pytest.raises(SppError, match="2 trained rows of model.embed_tokens, and trainable_token_indices"):
        merged(folder, adapter)
    write_json(adapter / "adapter_config.json", settings | {"trainable_token_indices": [3, 96]})
    with pytest.raises(SppError, match="its model.embed_tokens.weight is"):
        merged(folder, adapter)


def test_a_pruned_weight_that_was_trained_whole_is_refused(base, tmp_path):
    """Its zeros would be lost."""
    folder, adapter = base(), tmp_path / "adapter"
    trained(folder, adapter, modules_to_save=["up_proj"])
    with pytest.raises(SppError, match=r"dense model.layers.0.mlp.up_proj.weight, which is pruned .* modules_to_save"):
        merged(folder, adapter)


def test_verify_believes_no_manifest_that_excuses_a_pruned_weight(base, tmp_path):
    folder, adapter, out = base(), tmp_path / "adapter", tmp_path / "merged"
    trained(folder, adapter, modules_to_save=["lm_head"])
    merged(folder, adapter)
    name = "model.layers.0.mlp.up_proj.weight"
    write_json(out / MANIFEST, read_json(out / MANIFEST) | {"replaced": [HEAD, name]})
    shard = Checkpoint.open(out).files[name]
    save_file(load_file(shard) | {name: torch.ones(48, 32)}, shard)
    report = verify(VerifyOptions.build({"base": str(folder), "other": str(out)}))
    assert not report.verified and report.replaced == [HEAD]
    assert any(problem.startswith(name) for problem in report.problems)


def test_a_class_that_ties_whatever_its_configuration_says_is_an_error(base, tmp_path, monkeypatch):
    folder, adapter = base(tie_word_embeddings=True), tmp_path / "adapter"
    trained(folder, adapter, modules_to_save=["lm_head"])
    monkeypatch.setattr(merge_stage, "weights_in_files", lambda _: WeightNames({}, tied={HEAD: EMBEDDING}))
    with pytest.raises(SppError, match=r"ties them whatever config.json says; train it again .* modules_to_save"):
        merged(folder, adapter)
    assert not (tmp_path / "merged").exists()


def test_what_was_trained_whole_is_converted_to_hira_and_back(base, tmp_path):
    folder, adapter, hira, back = base(), tmp_path / "adapter", tmp_path / "hira", tmp_path / "back"
    expected = trained(folder, adapter, modules_to_save=["lm_head"])
    convert(ConvertOptions.build({"adapter": adapter, "out": hira, "base": str(folder)}))
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), str(hira))
    torch.testing.assert_close(logits(stock), expected, rtol=1e-4, atol=1e-5)
    convert(ConvertOptions.build({"adapter": hira, "out": back}))
    assert read_adapter(back).whole[HEAD].values.equal(read_adapter(adapter).whole[HEAD].values)

    trained(folder, tmp_path / "rows", trainable_token_indices=[3])
    with pytest.raises(UsageError, match="HiRA has no trainable_token_indices; merge the adapter"):
        convert(ConvertOptions.build({"adapter": tmp_path / "rows", "out": tmp_path / "none"}))
