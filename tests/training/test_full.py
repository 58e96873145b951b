"""Full fine-tuning in packed memory: the losses of masked training, kept zeros, a model as output, exact resumption."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import spp
from benchmarks.baselines.finetuning import MaskedWeight, replace_linears
from spp.checkpoints.atomic_folder import work_folder
from spp.checkpoints.json_files import read_json
from spp.checkpoints.model_card import CARD
from spp.errors import SppError, UsageError
from spp.models.pack_model import pack_, unpack_
from spp.models.packed_linear import PackedLinear
from spp.models.trainable_values import trainable_values
from spp.pruning.options import PruneOptions
from spp.pruning.prune import prune
from spp.training import progress_callback, trainer
from spp.training.options import TrainOptions
from spp.training.train import train


@pytest.fixture
def pruned(tmp_path, tiny_checkpoint) -> Path:
    asked = {"model": str(tiny_checkpoint), "out": tmp_path / "pruned", "criterion": "magnitude", "pattern": "75%"}
    prune(PruneOptions.build(asked))
    return tmp_path / "pruned"


@pytest.fixture
def options(pruned, stories, tmp_path):
    def make(out="tuned", **changes) -> TrainOptions:
        values = {"model": str(pruned), "out": tmp_path / out, "data": str(stories), "window": 48, "method": "full"}
        return TrainOptions.build({**values, "learning_rate": 0.01, "max_steps": 8, "device": "cpu", **changes})

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    ours, theirs = tensors(a), tensors(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def verified(base: Path, other: Path) -> bool:
    return spp.verify(spp.VerifyOptions.build({"base": str(base), "other": str(other)})).verified


def test_it_learns_and_writes_a_model_that_is_as_sparse_as_its_base(options, pruned, tmp_path):
    report = train(options(max_steps=24))
    first, last = ([loss for _, loss in part] for part in (report.losses[:3], report.losses[-3:]))
    assert sum(last) < sum(first) - 0.5
    before, after = tensors(pruned), tensors(report.out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert len(changed) == report.packed == 14 and all(name.endswith("proj.weight") for name in changed)
    for name in changed:
        assert not after[name][before[name] == 0].any() and before[name].dtype == after[name].dtype
    assert report.trainable_parameters == sum(int((before[name] != 0).sum()) for name in changed)
    assert report.zeros == sum(int((before[name] == 0).sum()) for name in changed)
    assert verified(pruned, report.out)
    assert not work_folder(tmp_path / "tuned").exists()
    record = report.out / "verification.json"
    assert spp.verify(spp.VerifyOptions.build({"base": str(report.out), "record": record})).verified
    assert AutoModelForCausalLM.from_pretrained(report.out).config.use_cache


def test_the_side_files_are_those_of_a_merged_model(options, pruned):
    out = train(options(max_steps=2)).out
    manifest, proof = read_json(out / "spp.json"), read_json(out / "verification.json")
    assert (manifest["kind"], manifest["method"], manifest["pattern"]) == ("merged", "full", "75%")
    assert (manifest["base"], manifest["training"]["steps"]) == (str(pruned), 2)
    assert manifest["training"]["settings"]["learning_rate"] == 0.01 and "r" not in manifest["training"]["settings"]
    assert proof["verified"] and len(proof["tensors"]) == 14 and proof["method"] == "full"
    card = (out / CARD).read_text()
    assert "fine-tuned in full" in card and "SPP](" not in card


def test_the_losses_are_those_of_masked_training(options, pruned, monkeypatch):
    """Masked full fine-tuning in plain torch, on the batches that our run had."""
    batches = []
    real = trainer.SppTrainer.compute_loss

    def seen(self, model, inputs, *args, **kwargs):
        batches.append({name: tensor.clone() for name, tensor in inputs.items() if name != "examples"})
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.SppTrainer, "compute_loss", seen)
    report = train(options(schedule="constant", warmup_ratio=0.0, learning_rate=1e-3, dtype="float32"))
    model = replace_linears(AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32), MaskedWeight).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    assert len(batches) == len(report.losses) == 8
    for batch, (_, ours) in zip(batches, report.losses, strict=True):
        loss = model(**batch).loss
        assert abs(loss.item() - ours) < 1e-5
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)  # as the Trainer does
        optimizer.step()


def test_master_values_are_in_fp32_and_rounded_once(options, tiny_model, tiny_tokenizer, tmp_path):
    """The same weights in a bf16 and in an fp32 file: the results differ by one rounding."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    for dtype in (torch.bfloat16, torch.float32):
        folder = tmp_path / str(dtype)
        model.to(dtype).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)

    def trained(dtype: torch.dtype, out: str, **more) -> dict[str, torch.Tensor]:
        changes = {"model": str(tmp_path / str(dtype)), "learning_rate": 1e-5, "dtype": "float32"}
        report = train(options(out, **changes, **more))
        assert verified(tmp_path / str(dtype), report.out)
        return tensors(report.out)

    exact, narrow = trained(torch.float32, "exact"), trained(torch.bfloat16, "narrow")
    drawn = trained(torch.bfloat16, "drawn", rounding="stochastic")
    names = [name for name in exact if name.endswith("proj.weight")]
    before = tensors(tmp_path / str(torch.bfloat16))
    for name in names:
        assert narrow[name].equal(exact[name].to(torch.bfloat16))
        assert ((drawn[name].float() - exact[name]).abs() <= exact[name].abs() * 2**-7).all()
    moved = [sum(int((after[name] != before[name]).sum()) for name in names) for after in (narrow, drawn)]
    assert 0 < moved[0] < moved[1]  # most steps are below a bf16 weight's precision


def test_layers_with_few_zeros_are_trained_too_and_keep_them(options, pruned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pruned)
    dense = model.model.layers[0].self_attn.q_proj.weight.data
    dense.copy_(torch.randn(dense.shape) / 8)
    dense[0, 0] = 0
    model.save_pretrained(tmp_path / "mixed")
    (tmp_path / "mixed" / "tokenizer.json").write_bytes((pruned / "tokenizer.json").read_bytes())
    (tmp_path / "mixed" / "tokenizer_config.json").write_bytes((pruned / "tokenizer_config.json").read_bytes())
    report = train(options(model=str(tmp_path / "mixed")))
    name = "model.layers.0.self_attn.q_proj.weight"
    after = tensors(report.out)[name]
    assert report.packed == 14 and after[0, 0] == 0 and not after.equal(tensors(tmp_path / "mixed")[name])
    assert verified(tmp_path / "mixed", report.out)


def test_target_modules_are_the_ones_that_change(options, pruned):
    report = train(options(target_modules="q_proj,v_proj", max_steps=2))
    before, after = tensors(pruned), tensors(report.out)
    changed = {name.split(".")[-2] for name in before if not before[name].equal(after[name])}
    assert changed == {"q_proj", "v_proj"}


@pytest.mark.parametrize("family", ["gpt2", "phi", "gpt_neox"])
def test_every_layout_of_weights_is_written_as_it_was_read(options, tiny_model, tiny_tokenizer, tmp_path, family):
    """Conv1D stores W transposed; others have biases, which stay as they are."""
    assert family in FAMILIES
    folder = tmp_path / family
    tiny_model(family).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    prune(PruneOptions.build({"model": str(folder), "out": tmp_path / "sparse", "criterion": "magnitude"}))
    report = train(options(model=str(tmp_path / "sparse"), window=32, max_steps=3))
    before, after = tensors(tmp_path / "sparse"), tensors(report.out)
    changed = [name for name in before if not before[name].equal(after[name])]
    assert len(changed) == report.packed > 0 and verified(tmp_path / "sparse", report.out)
    losses = []
    for folder in (tmp_path / "sparse", report.out):
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = torch.arange(4, 28)[None]
        losses.append(F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item())
    assert losses[0] != losses[1]


def test_validation_takes_the_best_weights(options, monkeypatch):
    settings = {"validation": 20, "schedule": "constant", "warmup_ratio": 0.0}
    short = train(options("short", max_steps=4, **settings)).out
    scripted = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(trainer.SppTrainer, "_validation_loss", lambda self: next(scripted))
    report = train(options(eval_steps=4, **settings))
    assert report.best_step == 4 and same(short, report.out)


@pytest.mark.parametrize("more", [{}, {"validation": 12, "eval_steps": 3}, {"device_batch_size": 4}])
def test_an_interrupted_run_resumes_to_the_bit(options, monkeypatch, tmp_path, more):
    whole = train(options("whole", save_steps=3, **more))

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress_callback.TrainingProgress, "on_log", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(options("again", save_steps=3, **more))
    beside = work_folder(tmp_path / "again")
    assert (beside / "checkpoint-3" / "complete.json").is_file()
    assert not list(beside.rglob("model*.safetensors"))  # the base is not copied
    report = train(options("again", save_steps=3, **more))
    assert report.losses == whole.losses and same(whole.out, report.out)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(options, tmp_path):
    """kill -9, in a process of its own."""
    whole = train(options("whole", save_steps=2, max_steps=40))
    values = options("again", save_steps=2, max_steps=40).model_dump(mode="json", exclude_defaults=True)
    command = [sys.executable, "-c", "import json, sys\nfrom spp.training.options import TrainOptions\n"
               "from spp.training.train import train\ntrain(TrainOptions.build(json.loads(sys.argv[1])))"]  # fmt: skip
    child = subprocess.Popen([*command, json.dumps(values)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not list(work_folder(tmp_path / "again").glob("checkpoint-*/complete.json")) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() != 0 and not (tmp_path / "again").exists()
    report = train(options("again", save_steps=2, max_steps=40))
    assert report.losses == whole.losses and same(whole.out, report.out)


def test_a_run_killed_while_it_writes_ends_as_any_other(options, monkeypatch, tmp_path):
    whole = train(options("whole", save_steps=3))

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("spp.adapters.merge.write_model_card", killed)
        with pytest.raises(KeyboardInterrupt):
            train(options("again", save_steps=3))
    assert not (tmp_path / "again").exists()
    assert same(whole.out, train(options("again", save_steps=3)).out)


def test_it_learns_from_a_teacher(options, tiny_checkpoint):
    alone = train(options("alone"))
    taught = train(options("taught", teacher=str(tiny_checkpoint), teacher_weight=0.7, teacher_features=0.1))
    assert verified(Path(options().model), taught.out) and not same(alone.out, taught.out)


def test_checkpointing_gives_the_same_model(options):
    plain = train(options("plain", gradient_checkpointing=False))
    saved = train(options("saved", gradient_checkpointing=True))
    assert [loss for _, loss in plain.losses] == pytest.approx([loss for _, loss in saved.losses], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"r": 2}, "r"),
        ({"scale": 1.0, "dropout": 0.1, "lora_rank": 4}, "lora-rank, scale, dropout"),
        ({"directions": 1, "init_weights": "published", "mode": "split"}, "directions, init-weights, mode"),
        ({"pack": False}, "no-pack"),
        ({"quantize": "nf4"}, "quantize"),
        ({"sharding": "zero3"}, "sharding zero3"),
    ],
)
def test_options_of_an_adapter_are_refused_by_name(options, changes, named):
    with pytest.raises(UsageError) as caught:
        options(**changes)
    assert str(caught.value).count("method full") == 1 and f"has no use for {named}; leave" in str(caught.value)


def test_an_adapter_is_not_rounded(options):
    with pytest.raises(UsageError, match="rounding stochastic: an adapter is not rounded; give it to spp merge"):
        options(method="spp", rounding="stochastic")


def test_a_dense_model_is_refused_before_training(options, tiny_checkpoint, tmp_path):
    with pytest.raises(UsageError, match="is dense: it has no zero that full fine-tuning could keep"):
        train(options(model=str(tiny_checkpoint)))
    assert not (tmp_path / "tuned").exists()


def test_in_python_an_optimizer_gets_the_values(pruned, tmp_path):
    model = pack_(AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.bfloat16)).train()
    values = trainable_values(model)
    assert len(values) == 14 and all(one.dtype == torch.float32 and one.ndim == 1 for one in values)
    assert [id(one) for one in model.parameters() if one.requires_grad] == [id(one) for one in values]
    ids = torch.arange(4, 28)[None]
    optimizer = torch.optim.AdamW(values, lr=0.01)
    losses = []
    for _ in range(5):
        losses.append(loss := model(input_ids=ids, labels=ids).loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    unpack_(model, torch.bfloat16).save_pretrained(tmp_path / "after")
    assert verified(pruned, tmp_path / "after")


def test_a_damaged_manifest_is_found_before_training(options, pruned, tmp_path):
    (pruned / "spp.json").write_text('{"pattern": ')
    with pytest.raises(SppError, match=r"spp\.json: not valid JSON"):
        train(options())
    assert not work_folder(tmp_path / "tuned").exists()


def test_some_layers_alone_can_be_trained(pruned):
    model = pack_(AutoModelForCausalLM.from_pretrained(pruned))
    name = next(name for name, module in model.named_modules() if isinstance(module, PackedLinear))
    assert len(trainable_values(model, [name])) == 1
    with pytest.raises(UsageError, match=r"no layer of this LlamaForCausalLM is packed; call spp\.pack_"):
        trainable_values(AutoModelForCausalLM.from_pretrained(pruned))


def test_few_zeros_are_no_reason_to_warn_of_a_dense_model(options, caplog):
    with caplog.at_level(logging.WARNING, "spp"):
        train(options(max_steps=1))
    assert "IS DENSE" not in caplog.text
