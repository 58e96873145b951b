"""The prune stage: from a folder to a folder."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIGS
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from spp.checkpoints.checkpoint import MANIFEST, Checkpoint
from spp.checkpoints.json_files import read_json
from spp.data.calibration import calibration_windows
from spp.errors import SppError, UsageError
from spp.models.architecture import is_transposed, prunable_linears, weight_oi
from spp.patterns import NM, Pattern, parse_pattern
from spp.pruning.criteria import magnitude
from spp.pruning.criteria.result import Pruned
from spp.pruning.in_memory import prune_model
from spp.pruning.options import PruneOptions, PruningSettings
from spp.pruning.prune import PruneReport, prune
from spp.pruning.steps import CRITERIA

MakeModel = Callable[..., PreTrainedModel]
Run = Callable[..., PruneReport]


@pytest.fixture
def run(tmp_path: Path, stories: Path) -> Run:
    """Prune to tmp_path/pruned, calibrated on a few short windows."""

    def call(model: Path, **changes: Any) -> PruneReport:
        defaults = {"out": tmp_path / "pruned", "calibration": str(stories), "samples": 8, "window": 32}
        return prune(PruneOptions.build({"model": str(model), **defaults, **changes}))

    return call


def tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return dict(checkpoint.items())


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize(
    ("family", "criterion"),
    [(family, "wanda") for family in TINY_CONFIGS] + [("llama", "sparsegpt"), ("gpt2", "sparsegpt")],
)
def test_every_family_comes_out_whole(
    family: str,
    criterion: str,
    tiny_model: MakeModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    run: Run,
) -> None:
    dense = tmp_path / "dense"
    tiny_model(family, dtype=torch.bfloat16).save_pretrained(dense)
    tiny_tokenizer.save_pretrained(dense)
    report = run(dense, criterion=criterion)

    model = AutoModelForCausalLM.from_pretrained(report.out)
    assert model.dtype == torch.bfloat16
    linears = prunable_linears(model)
    assert sorted(report.tensors) == sorted(f"{name}.weight" for name in linears)
    for name, module in linears.items():
        weight = weight_oi(module)
        assert NM(2, 4).violations(weight) == 0
        assert report.tensors[f"{name}.weight"].sparsity == pytest.approx(0.5, abs=0.005)
        assert report.tensors[f"{name}.weight"].transposed == is_transposed(module)
    assert report.sparsity == pytest.approx(0.5, abs=0.005)

    before, after = tensors(dense), tensors(report.out)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert not torch.signbit(tensor[tensor == 0]).any(), name
        if name in report.tensors:
            kept = tensor != 0
            if criterion != "sparsegpt":
                assert tensor[kept].equal(before[name][kept])
        else:
            assert bits(tensor).equal(bits(before[name])), name
    assert read_json(dense / "config.json") == read_json(report.out / "config.json")
    assert (dense / "generation_config.json").read_bytes() == (report.out / "generation_config.json").read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (dense / name).read_bytes() == (report.out / name).read_bytes()


def test_files_hold_what_the_engine_makes_of_the_calibration_windows(
    tiny_checkpoint: Path, tiny_tokenizer: PreTrainedTokenizerFast, stories: Path, run: Run
) -> None:
    """Pruned in fp32 on a CPU, and rounded once to the bf16 of the files."""
    report = run(tiny_checkpoint, criterion="sparsegpt", device="cpu", seed=5)
    drawn = calibration_windows(tiny_tokenizer, str(stories), samples=8, window=32, seed=5)
    assert report.calibration is not None
    assert report.calibration.sha256 == drawn.sha256
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    prune_model(model, PruningSettings(criterion="sparsegpt"), drawn.windows)
    after = tensors(report.out)
    for name, module in prunable_linears(model).items():
        assert after[f"{name}.weight"].equal(weight_oi(module).bfloat16()), name


def test_updates_too_large_for_the_file_are_named(
    tiny_model: MakeModel, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def huge(weight: Tensor, value: Tensor | None, pattern: Pattern) -> Pruned:
        pruned = magnitude.prune(weight, value, pattern)
        return Pruned(pruned.weight * 1e7, pruned.mask)

    tiny_model("llama", dtype=torch.float16).save_pretrained(tmp_path / "dense")
    monkeypatch.setitem(CRITERIA, "magnitude", dataclasses.replace(CRITERIA["magnitude"], prune=huge))
    with pytest.raises(SppError, match=r"proj\.weight: an updated weight is too large for the checkpoint's float16"):
        run(tmp_path / "dense", criterion="magnitude", dtype="float32")
    assert not (tmp_path / "pruned").exists()


def test_manifest_and_report_say_the_same(tiny_checkpoint: Path, run: Run, stories: Path) -> None:
    report = run(tiny_checkpoint, pattern="50%", seed=3)
    manifest = read_json(report.out / MANIFEST)
    assert manifest["tool"] == "spp"
    assert manifest["kind"] == "pruned"
    assert manifest["base"] == str(tiny_checkpoint)
    assert manifest["pattern"] == report.pattern == "50%"
    assert manifest["criterion"] == report.criterion == "wanda"
    assert manifest["sparsity"] == report.sparsity
    assert manifest["skipped"] == []
    assert manifest["tensors"]["model.layers.0.mlp.up_proj.weight"] == {"sparsity": 0.5, "transposed": False}
    calibration = manifest["calibration"]
    assert (calibration["samples"], calibration["window"], calibration["seed"]) == (8, 32, 3)
    assert str(stories) in calibration["source"]
    assert len(calibration["sha256"]) == 64
    assert "sparsity_config" not in read_json(report.out / "config.json")


def test_the_result_depends_on_the_seed_alone(tiny_checkpoint: Path, run: Run, tmp_path: Path) -> None:
    first, again, other = (
        tensors(run(tiny_checkpoint, out=tmp_path / name, seed=seed, pattern="75%").out)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(bits(first[name]).equal(bits(again[name])) for name in first)
    assert not all(bits(first[name]).equal(bits(other[name])) for name in first)


def test_magnitude_needs_neither_tokenizer_nor_text(tiny_model: MakeModel, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    out = tmp_path / "deep" / "er" / "pruned"
    report = prune(PruneOptions.build({"model": str(tmp_path / "dense"), "out": out, "criterion": "magnitude"}))
    assert report.calibration is None
    assert report.sparsity == 0.5
    assert read_json(out / MANIFEST)["calibration"] is None


def test_calibration_without_a_tokenizer_is_refused(tiny_model: MakeModel, tmp_path: Path, run: Run) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match="tokenizer"):
        run(tmp_path / "dense")
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_as_they_were(tiny_model: MakeModel, tmp_path: Path, run: Run, tied: bool) -> None:
    tiny_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "dense")
    report = run(tmp_path / "dense", criterion="magnitude")
    assert ("lm_head.weight" in tensors(report.out)) is not tied
    model = AutoModelForCausalLM.from_pretrained(report.out)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_logits_are_those_of_the_pruned_model(tiny_model: MakeModel, tmp_path: Path, run: Run) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "dense")
    report = run(tmp_path / "dense", criterion="magnitude", pattern="50%")
    for module in prunable_linears(model).values():
        weight = weight_oi(module)
        weight.copy_(torch.where(parse_pattern("50%").keep_mask(weight.abs()), weight, 0))
    reloaded = AutoModelForCausalLM.from_pretrained(report.out)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert reloaded(tokens).logits.equal(model(tokens).logits)


def test_mixed_and_narrow_dtypes_keep_the_bits_of_survivors(tiny_model: MakeModel, tmp_path: Path, run: Run) -> None:
    """fp32 files pruned in bf16: survivors keep their 24 bits, and an fp16 norm stays fp16."""
    dense = tmp_path / "dense"
    tiny_model("llama").save_pretrained(dense)
    weights = load_file(dense / "model.safetensors")
    weights["model.norm.weight"] = torch.rand(32).half()
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    report = run(dense, criterion="magnitude", dtype="bfloat16")
    after = tensors(report.out)
    assert bits(after["model.norm.weight"]).equal(bits(weights["model.norm.weight"]))
    for name in report.tensors:
        kept = after[name] != 0
        assert after[name].dtype == torch.float32
        assert after[name][kept].equal(weights[name][kept])
        assert kept.double().mean() == 0.5


def test_sharded_checkpoints_keep_their_shards(tiny_model: MakeModel, tmp_path: Path, run: Run) -> None:
    dense = tmp_path / "dense"
    tiny_model("llama").save_pretrained(dense, max_shard_size="20KB")
    report = run(dense, criterion="magnitude")
    names = {path.name for path in dense.iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    assert {path.name for path in report.out.iterdir()} == names | {MANIFEST}
    assert AutoModelForCausalLM.from_pretrained(report.out)


def test_checkpoints_of_the_bare_base_model(tiny_model: MakeModel, tmp_path: Path, run: Run) -> None:
    """GPT-2 on the hub is one: its tensors are named h.0... and not transformer.h.0..."""
    dense = tmp_path / "dense"
    model = tiny_model("gpt2")
    model.save_pretrained(dense)
    save_file(
        {
            name.removeprefix("transformer."): tensor.contiguous()
            for name, tensor in model.transformer.state_dict().items()
        },
        dense / "model.safetensors",
        metadata={"format": "pt"},
    )
    report = run(dense, criterion="magnitude")
    assert report.tensors["h.1.mlp.c_fc.weight"].transposed
    reloaded = AutoModelForCausalLM.from_pretrained(report.out)
    assert all(NM(2, 4).violations(weight_oi(module)) == 0 for module in prunable_linears(reloaded).values())


def test_negative_zeros_become_positive_everywhere(tiny_checkpoint: Path, run: Run) -> None:
    weights = load_file(tiny_checkpoint / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        weights[name][0, :4] = -0.0
    save_file(weights, tiny_checkpoint / "model.safetensors", metadata={"format": "pt"})
    for name, tensor in tensors(run(tiny_checkpoint).out).items():
        assert not torch.signbit(tensor[tensor == 0]).any(), name
        if name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
            assert not tensor[0, :4].any()


def test_a_sparse_announcement_does_not_travel(tiny_checkpoint: Path, run: Run) -> None:
    config = read_json(tiny_checkpoint / "config.json")
    (tiny_checkpoint / "config.json").write_text(json.dumps({**config, "sparsity_config": {"format": "sparse-24"}}))
    report = run(tiny_checkpoint, criterion="magnitude")
    assert read_json(report.out / "config.json") == config


def test_quantized_models_are_refused(tiny_checkpoint: Path, run: Run) -> None:
    config = read_json(tiny_checkpoint / "config.json")
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tiny_checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="is quantized"):
        run(tiny_checkpoint)


def test_an_already_sparse_model_is_announced(
    tiny_checkpoint: Path, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "spp"):
        once = run(tiny_checkpoint, out=tmp_path / "once", pattern="1:4")
        assert "were zero before" not in caplog.text
        twice = run(once.out, out=tmp_path / "twice", pattern="2:4", criterion="sparsegpt")
    assert "75.0 % of these weights were zero before; all of them still are" in caplog.text
    assert twice.sparsity == pytest.approx(0.75, abs=0.001)
    first, second = tensors(once.out), tensors(twice.out)
    assert all(not second[name][first[name] == 0].any() for name in once.tensors)


def test_log_says_what_was_used(tiny_checkpoint: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "spp"):
        run(tiny_checkpoint)
    assert "calibrating on 8 windows of 32 tokens from" in caplog.text
    assert "stories.jsonl" in caplog.text
    assert "50.00 % of the weights of 14 tensors are zero" in caplog.text


def test_indivisible_layers(tiny_model: MakeModel, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model("llama", intermediate_size=50).save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match="2 of 14 layers.*--skip-indivisible"):
        run(tmp_path / "dense", criterion="magnitude")
    assert not (tmp_path / "pruned").exists()
    report = run(tmp_path / "dense", criterion="magnitude", skip_indivisible=True)
    assert report.skipped == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert len(report.tensors) == 12
    assert report.sparsity == 0.5
    assert "down_proj stays dense" in caplog.text
    before, after = tensors(tmp_path / "dense"), tensors(report.out)
    for name in report.skipped:
        assert bits(after[f"{name}.weight"]).equal(bits(before[f"{name}.weight"]))


def test_refuses_before_work(tiny_checkpoint: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spp.pruning.prune.prune_blocks", lambda *_, **__: pytest.fail("began with the work"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(UsageError, match="not empty"):
        run(tiny_checkpoint, out=tmp_path / "full")
    with pytest.raises(UsageError, match="is or holds the input"):
        run(tiny_checkpoint, out=tiny_checkpoint, overwrite=True)
    with pytest.raises(UsageError, match="no such folder"):
        run(tmp_path / "missing")
    with pytest.raises(UsageError, match="pattern"):
        run(tiny_checkpoint, pattern="4:2")


def test_overwrites_on_request(tiny_checkpoint: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "something").touch()
    run(tiny_checkpoint, criterion="magnitude", overwrite=True)
    assert not (tmp_path / "pruned" / "something").exists()
    assert (tmp_path / "pruned" / "config.json").exists()


def test_a_failure_leaves_nothing_behind(tiny_checkpoint: Path, run: Run, tmp_path: Path) -> None:
    weights = load_file(tiny_checkpoint / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, tiny_checkpoint / "model.safetensors", metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SppError, match=r"model\.layers\.1\.mlp\.up_proj: the weight holds NaN"):
        run(tiny_checkpoint)
    assert sorted(tmp_path.iterdir()) == before


def test_a_window_longer_than_the_context_is_refused(tiny_checkpoint: Path, run: Run) -> None:
    with pytest.raises(UsageError, match="context of 64"):
        run(tiny_checkpoint, window=65)


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("story", 256),
        pytest.param("stories260K", 256, marks=pytest.mark.slow),
        pytest.param("shakespeare_opt", 64, marks=pytest.mark.slow),
    ],
)
def test_real_models_lose_less_with_calibration(shared_data: Path, tmp_path: Path, name: str, window: int) -> None:
    """Held-out loss: dense < SparseGPT << magnitude, and Wanda in between."""
    dense = shared_data / "models" / name
    text = shared_data / "corpora" / ("shakespeare.txt" if name == "shakespeare_opt" else "tinystories_train.jsonl")
    values = {"model": str(dense), "calibration": str(text), "window": window, "samples": 64, "pattern": "2:4"}
    loss = {"dense": held_out_loss(dense, shared_data, name)}
    for criterion in ("magnitude", "wanda", "sparsegpt"):
        prune(PruneOptions.build({**values, "criterion": criterion, "out": tmp_path / criterion}))
        loss[criterion] = held_out_loss(tmp_path / criterion, shared_data, name)
    assert loss["dense"] < loss["wanda"] < loss["magnitude"]
    assert loss["dense"] < loss["sparsegpt"] < loss["magnitude"] - 0.2


def held_out_loss(folder: Path, shared_data: Path, name: str) -> float:
    """Mean negative log-likelihood per token, in nats, of a little text."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name == "shakespeare_opt":
        text = (shared_data / "corpora" / "shakespeare.txt").read_text()[-6400:]
        documents = [text[start : start + 64] for start in range(0, 6400, 64)]
    else:
        with (shared_data / "corpora" / "tinystories_valid.jsonl").open() as lines:
            documents = [json.loads(next(lines))["text"] for _ in range(30)]
    losses, count = 0.0, 0
    for document in documents:
        ids = tokenizer(document, return_tensors="pt").input_ids[:, :512]
        with torch.no_grad():
            losses += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return losses / count
