"""Training: it learns, keeps the zeros, trains the adapter alone, resumes to the bit, and says what is wrong."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from spp.checkpoints.atomic_folder import work_folder
from spp.checkpoints.json_files import read_json
from spp.data.examples import IGNORED, Example, collate
from spp.errors import SppError, UsageError
from spp.pruning.options import PruneOptions
from spp.pruning.prune import prune
from spp.training import checkpoints, progress_callback, trainer
from spp.training.options import TrainOptions
from spp.training.train import train
from spp.training.training_data import hold_out


@pytest.fixture
def pruned(tmp_path, tiny_checkpoint) -> Path:
    prune(PruneOptions.build({"model": str(tiny_checkpoint), "out": tmp_path / "pruned", "criterion": "magnitude"}))
    return tmp_path / "pruned"


@pytest.fixture
def options(pruned, stories, tmp_path):
    def make(out="adapter", **changes) -> TrainOptions:
        values = {"model": str(pruned), "out": tmp_path / out, "data": str(stories), "window": 48}
        return TrainOptions.build({**values, "learning_rate": 0.3, "max_steps": 12, "r": 4, **changes})

    return make


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    ours, theirs = factors(a), factors(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def interrupted_at(step: int):
    """A `TrainingProgress.on_log` that stands for Ctrl-C at a step."""

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    return on_log


def test_it_learns_and_only_the_adapter_is_new(options, pruned, tmp_path):
    weights = (pruned / "model.safetensors").read_bytes()
    report = train(options())
    first, last = ([loss for _, loss in part] for part in (report.losses[:3], report.losses[-3:]))
    assert sum(last) < sum(first) - 0.5  # 3 steps each; without learning they differ by under 0.05
    assert [step for step, _ in report.losses] == list(range(1, 13)) and report.steps == 12
    assert (pruned / "model.safetensors").read_bytes() == weights
    assert {path.name for path in report.out.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "spp.json",
    }
    assert not any(path.suffix in {".bin", ".pt", ".pth"} for path in report.out.iterdir())
    assert not work_folder(tmp_path / "adapter").exists()
    assert all(name.endswith((".spp_A.weight", ".spp_B.weight")) for name in factors(report.out))
    assert report.trainable_parameters == sum(tensor.numel() for tensor in factors(report.out).values())
    assert read_json(report.out / "adapter_config.json")["base_model_name_or_path"] == str(pruned)

    base = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, report.out)
    moved = [m.spp_B["default"].weight.abs().max() for m in adapted.modules() if hasattr(m, "spp_B")]
    assert len(moved) == 14 and all(float(size) > 0 for size in moved)


def test_the_card_of_an_adapter_says_how_to_load_it(options, pruned):
    card = (train(options(max_steps=1)).out / "README.md").read_text()
    beginning = card[:1200]
    assert "import spp" in beginning and "KeyError: 'SPP'" in beginning and str(pruned) in beginning
    assert "spp convert THIS OUT --to hira" in beginning and "| steps | `1` |" in card


def test_tokens_are_counted_without_padding(options, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "x" * length}) + "\n" for length in (3, 10, 5, 20)))
    report = train(options(data=str(data), epochs=2, max_steps=None, batch_size=2))
    lengths = [min(1 + length + 1, 48) for length in (3, 10, 5, 20)]  # with <bos> and <eos>
    assert report.tokens == 2 * sum(lengths) and report.steps == 4 and not report.join_documents


# The checkpoint to resume from is the first one, one within the second epoch, and one between two epochs.
@pytest.mark.parametrize(("stop", "documents"), [(5, 200), pytest.param(9, 40, marks=pytest.mark.slow), (6, 32)])
def test_a_killed_run_resumes_to_the_bit(options, stories, monkeypatch, tmp_path, stop, documents):
    stories.write_text("\n".join(stories.read_text().splitlines()[:documents]))
    settings = {"dropout": 0.1, "save_steps": 4, "device_batch_size": 4}
    whole = train(options("whole", **settings))

    with monkeypatch.context() as patch:
        patch.setattr(progress_callback.TrainingProgress, "on_log", interrupted_at(stop))
        with pytest.raises(KeyboardInterrupt):
            train(options("again", **settings))
    beside = work_folder(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert (beside / f"checkpoint-{stop // 4 * 4}" / "complete.json").is_file()
    assert not list(beside.rglob("model*.safetensors"))  # the base is not copied

    resumed: list[str | None] = []
    original = checkpoints.Checkpoints.latest
    monkeypatch.setattr(checkpoints.Checkpoints, "latest", lambda self: resumed.append(original(self)) or resumed[-1])
    report = train(options("again", **settings))
    assert resumed == [beside / f"checkpoint-{stop // 4 * 4}"]
    assert same(tmp_path / "whole", tmp_path / "again")
    assert (report.losses, report.tokens) == (whole.losses, whole.tokens)


def test_a_run_killed_after_its_last_step_trains_no_further(options, monkeypatch, tmp_path):
    train(options("whole", save_steps=4))

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("spp.checkpoints.atomic_folder._publish", killed)
        with pytest.raises(KeyboardInterrupt):
            train(options("again", save_steps=4))
    report = train(options("again", save_steps=4))
    assert report.steps == len(report.losses) == 12
    assert same(tmp_path / "whole", tmp_path / "again")


def test_a_damaged_checkpoint_is_passed_over(options, monkeypatch, tmp_path):
    train(options("whole", save_steps=4))
    with monkeypatch.context() as patch:
        patch.setattr(progress_callback.TrainingProgress, "on_log", interrupted_at(9))
        with pytest.raises(KeyboardInterrupt):
            train(options("again", save_steps=4))
    optimizer = work_folder(tmp_path / "again") / "checkpoint-8" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    train(options("again", save_steps=4))
    assert same(tmp_path / "whole", tmp_path / "again")


def test_a_half_written_checkpoint_is_passed_over(options, monkeypatch, tmp_path):
    train(options("whole", save_steps=4))

    def killed_while_saving(self, args, state, control, **kwargs):
        if state.global_step == 8:
            (self.folder / "checkpoint-8" / "optimizer.pt").write_bytes(b"half")
            raise KeyboardInterrupt
        original(self, args, state, control, **kwargs)

    original = checkpoints.Checkpoints.on_save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "on_save", killed_while_saving)
        with pytest.raises(KeyboardInterrupt):
            train(options("again", save_steps=4))
    train(options("again", save_steps=4))
    assert same(tmp_path / "whole", tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 0.01}, "learning-rate was 0.3 and is 0.01 now"),
        pytest.param({"r": 8}, "r was 4 and is 8 now", marks=pytest.mark.slow),
        pytest.param(
            {"seed": 1, "init_weights": "published"},
            "init-weights was ones and is published now",
            marks=pytest.mark.slow,
        ),
        pytest.param({"data": "other"}, "training data changed", marks=pytest.mark.slow),
        ({"model": "other"}, "weights of the model changed"),
    ],
)
def test_checkpoints_of_another_run(options, tiny_checkpoint, monkeypatch, stories, tmp_path, change, named, caplog):
    """They are kept, unless the user says otherwise."""
    if "data" in change:
        other = tmp_path / "other.jsonl"
        other.write_text("\n".join(stories.read_text().splitlines()[:120]) + "\n")
        change = {"data": str(other)}
    if "model" in change:
        prune(PruneOptions.build({"model": str(tiny_checkpoint), "out": tmp_path / "m", "pattern": "50%"}))
        change = {"model": str(tmp_path / "m")}
    train(options("whole", **change))

    with monkeypatch.context() as patch:
        patch.setattr(progress_callback.TrainingProgress, "on_log", interrupted_at(6))
        with pytest.raises(KeyboardInterrupt):
            train(options("again", save_steps=4))
    with pytest.raises(UsageError, match=re.escape(named)) as caught:
        train(options("again", save_steps=4, **change))
    assert "--overwrite" in str(caught.value)
    assert (work_folder(tmp_path / "again") / "checkpoint-4" / "complete.json").is_file()
    with caplog.at_level(logging.INFO, "spp"):
        monkeypatch.setattr(logging.getLogger("spp"), "propagate", True)
        train(options("again", save_steps=4, overwrite=True, **change))
    assert "starting over" in caplog.text
    assert same(tmp_path / "whole", tmp_path / "again")


def test_seeds_matter_and_repeat(options, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(options(out, seed=seed, max_steps=2))
    assert same(tmp_path / "a", tmp_path / "b") and not same(tmp_path / "a", tmp_path / "c")


def test_accumulation_is_one_batch(options):
    """Sequences differ in length, so this holds only if the loss is a mean over the tokens of the whole step."""
    whole = train(options("whole", max_steps=4, batch_size=6, device_batch_size=6))
    parts = train(options("parts", max_steps=4, batch_size=6, device_batch_size=2))
    for (_, ours), (_, theirs) in zip(parts.losses, whole.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_gradient_checkpointing_changes_nothing(options, tmp_path):
    train(options("plain", max_steps=3))
    train(options("checkpointed", max_steps=3, gradient_checkpointing=True))
    for key, ours in factors(tmp_path / "checkpointed").items():
        torch.testing.assert_close(ours, factors(tmp_path / "plain")[key], rtol=1e-5, atol=1e-6)


def test_documents_are_joined_by_default_where_documents_are_long(options, tmp_path):
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps({"text": "the cat sat. " * 20}) + "\n" for _ in range(4)))
    report = train(options("long", data=str(data), max_steps=1))
    assert report.join_documents and report.examples == 4 * (1 + 260 + 1) // 48
    assert not train(options("short", data=str(data), max_steps=1, join_documents=False)).join_documents


def test_only_the_first_tokens_are_read(options, stories, tmp_path, monkeypatch):
    """As from a file that ends there; what comes after is not even looked at."""
    lines = stories.read_text().splitlines()
    tokens = [1 + len(json.loads(line)["text"]) + 1 for line in lines]
    short, endless = tmp_path / "short.jsonl", tmp_path / "endless.jsonl"
    short.write_text("\n".join(lines[:150]) + "\n")
    endless.write_text("\n".join([*lines, "not JSON"]) + "\n")
    monkeypatch.setattr("spp.training.training_data._READ_AT_ONCE", 50)
    settings = {"window": 64, "max_steps": 3}
    report = train(options("a", data=str(endless), max_tokens=sum(tokens[:150]), **settings))
    assert report.examples == 150
    train(options("b", data=str(short), **settings))
    assert same(tmp_path / "a", tmp_path / "b")
    cut = train(options("c", data=str(endless), max_tokens=sum(tokens[:2]) + 10, **settings, overwrite=True))
    assert (cut.examples, cut.tokens) == (3, 3 * (sum(tokens[:2]) + 10))
    with pytest.raises(UsageError, match="line 201: expected one JSON object per line"):
        train(options("d", data=str(endless), max_tokens=10**9))


def test_the_loss_of_completions_alone(options, pruned, tiny_tokenizer, tmp_path):
    data = tmp_path / "pairs.jsonl"
    pair = {"prompt": "the prompt: ", "completion": "answer"}
    data.write_text((json.dumps(pair) + "\n") * 8)
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    ids = torch.tensor([*tiny_tokenizer("the prompt: answer").input_ids, tiny_tokenizer.eos_token_id])
    with torch.no_grad():
        log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
    losses = -log_p.gather(1, ids[1:, None])[:, 0]
    exact = {"max_steps": 1, "dtype": "float32"}
    for completion_only, expected in ((True, losses[-len("answer") - 1 :].mean()), (False, losses.mean())):
        report = train(options(f"{completion_only}", data=str(data), completion_only=completion_only, **exact))
        assert report.losses[0][1] == pytest.approx(float(expected), rel=1e-5)


def test_batches_are_padded_on_the_right():
    batch = collate([Example([5, 6, 7], [IGNORED, 6, 7]), Example([8], [8])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


def test_a_dense_model_is_warned_about(options, tiny_checkpoint, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("spp"), "propagate", True)
    train(options(model=str(tiny_checkpoint), max_steps=1))
    ours = [record for record in caplog.records if record.name == "spp" and record.levelno == logging.WARNING]
    [warning] = {record.getMessage() for record in ours}
    assert "IS DENSE: 0.00 %" in warning and "spp prune" in warning


def test_named_targets(options):
    report = train(options(target_modules="q_proj, down_proj", max_steps=1))
    assert len(factors(report.out)) == 2 * 2 * 2
    with pytest.raises(UsageError, match=r"no query, w1; its linear layers are down_proj, gate_proj"):
        train(options("b", target_modules="q_proj,query,w1"))
    with pytest.raises(UsageError, match="target-modules is empty"):
        train(options("b", target_modules=" , "))


def test_a_loss_that_is_not_finite_stops_training(options, tmp_path):
    with pytest.raises(SppError, match=r"the loss is (nan|inf) at step \d.*--learning-rate"):
        train(options(learning_rate=1e30))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("losses", "warned"),
    [
        ([4.4, 4.3, 4.6, 4.5, 4.4, 4.3, 4.2, 4.1, 4.0, 3.9, 3.9, 3.8], False),
        ([4.4, 4.3, 4.6, 4.5, 6.9, 4.4, 4.2, 4.1, 4.0, 3.9, 3.9, 3.8], False),  # one odd batch
        ([4.4, 4.5, 5.6, 7.2, 7.1, 7.0, 6.9, 6.8, 6.7, 6.6, 6.5, 6.4], True),
    ],
)
def test_a_loss_that_rises_out_of_its_first_range_is_warned_about_once(options, monkeypatch, caplog, losses, warned):
    real = progress_callback.TrainingProgress.on_log

    def logged(self, args, state, control, logs=None, **kwargs):
        real(self, args, state, control, {**logs, "loss": losses[state.global_step - 1]} if logs else logs, **kwargs)

    monkeypatch.setattr(progress_callback.TrainingProgress, "on_log", logged)
    monkeypatch.setattr(logging.getLogger("spp"), "propagate", True)
    train(options())
    said = "the learning rate 0.3 is probably too high for this model"
    # Distinct ones: where the logger has caplog's handler as well as its parent, each record is captured twice.
    assert len({id(one) for one in caplog.records if said in one.getMessage()}) == warned


def test_what_is_known_of_a_step_that_went_wrong(options, monkeypatch, tmp_path):
    """The batch and the last good checkpoint are named."""
    real = progress_callback.TrainingProgress.on_log

    def spoilt(self, args, state, control, logs=None, **kwargs):
        real(self, args, state, control, {**logs, "loss": math.nan} if state.global_step == 6 else logs, **kwargs)

    monkeypatch.setattr(progress_callback.TrainingProgress, "on_log", spoilt)
    with pytest.raises(SppError) as caught:
        train(options(batch_size=4, device_batch_size=2, save_steps=5))
    assert "the loss is nan at step 6" in str(caught.value)
    assert f"The last good checkpoint is {work_folder(tmp_path / 'adapter') / 'checkpoint-5'}" in str(caught.value)
    numbers = [int(number) for number in re.search(r"counted from 0: ([\d, ]+)", str(caught.value))[1].split(", ")]
    assert len(set(numbers)) == 4 and all(0 <= number < 200 for number in numbers)


@pytest.mark.parametrize("save_steps", [pytest.param(100, marks=pytest.mark.slow), 2])
def test_a_batch_that_does_not_fit_is_made_smaller(options, monkeypatch, tmp_path, caplog, save_steps):
    """As if the smaller one had been asked for; with checkpoints, from the last one on."""
    small = train(options("small", device_batch_size=2, save_steps=save_steps))
    forward, failed = LlamaForCausalLM.forward, []

    def out_of_memory(self, input_ids=None, **kwargs):
        if len(input_ids) > 2:
            failed.append(len(input_ids))
            raise torch.OutOfMemoryError
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", out_of_memory)
    with caplog.at_level(logging.WARNING, "spp"):
        report = train(options(save_steps=save_steps))
    assert failed == [8, 4]
    assert "8 sequences at once do not fit into memory; going on with 4" in caplog.text
    assert report.losses == small.losses and same(tmp_path / "small", tmp_path / "adapter")


def test_no_batch_fits(options, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(LlamaForCausalLM, "forward", out_of_memory)
    for chosen in ({}, {"device_batch_size": 4}):
        with pytest.raises(SppError, match="out of memory: lower --device-batch-size"):
            train(options(**chosen))


def test_the_best_adapter_is_taken(options, monkeypatch, tmp_path):
    """It is the one of a run that stops there."""
    settings = {"validation": 20, "schedule": "constant", "warmup_ratio": 0.0}
    train(options("short", max_steps=8, **settings))
    scripted = iter([4.0, 3.0, 1.0, 2.0])
    monkeypatch.setattr(trainer.SppTrainer, "_validation_loss", lambda self: next(scripted))
    report = train(options(eval_steps=4, **settings))
    assert report.validation == [(0, 4.0), (4, 3.0), (8, 1.0), (12, 2.0)] and report.best_step == 8
    assert (report.steps, report.examples) == (12, 180)
    assert same(tmp_path / "short", tmp_path / "adapter")


def test_a_validation_loss_that_never_is_finite(options, monkeypatch, tmp_path):
    monkeypatch.setattr(trainer.SppTrainer, "_validation_loss", lambda self: math.nan)
    with pytest.raises(SppError, match="on held-out examples was never finite"):
        train(options(validation=20, max_steps=2))
    assert not (tmp_path / "adapter").exists()


def test_the_validation_loss(options, pruned, stories):
    report = train(options(validation=20, dtype="float32"))
    whole = [Example(one, one) for one in tokenized(pruned, stories)]
    held_out = hold_out(whole, options(validation=20))[1]
    base = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    found = loss_on(PeftModel.from_pretrained(base, report.out), held_out)
    before = loss_on(AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32), held_out)
    assert report.validation == [(0, pytest.approx(before, rel=1e-5)), (12, pytest.approx(found, rel=1e-5))]


def test_validation_changes_nothing_but_the_choice(options, tmp_path):
    """Neither the order of examples nor dropout depends on how often it is evaluated."""
    settings = {"validation": 20, "dropout": 0.1}
    often = train(options("often", eval_steps=1, **settings))
    once = train(options("once", eval_steps=50, **settings))
    assert often.losses == once.losses
    assert [step for step, _ in once.validation] == [0, 12] and once.best_step == 12


def test_a_killed_run_with_validation_resumes_to_the_bit(options, monkeypatch, tmp_path):
    settings = {"validation": 20, "eval_steps": 2, "save_steps": 3, "learning_rate": 3.0}
    whole = train(options("whole", **settings))
    with monkeypatch.context() as patch:
        patch.setattr(progress_callback.TrainingProgress, "on_log", interrupted_at(8))
        with pytest.raises(KeyboardInterrupt):
            train(options("again", **settings))
    again = train(options("again", **settings))
    assert (again.losses, again.validation, again.best_step) == (whole.losses, whole.validation, whole.best_step)
    assert same(tmp_path / "whole", tmp_path / "again")


def test_nothing_would_be_left_to_train_on(options):
    with pytest.raises(UsageError, match="validation 200 would leave nothing of 200 examples"):
        train(options(validation=200))


def test_a_report_to_nowhere(options, tmp_path):
    with pytest.raises(UsageError, match="report-to: nonsense cannot be used here.*available: "):
        train(options(report_to="nonsense"))
    assert not work_folder(tmp_path / "adapter").exists()


def test_only_so_many_checkpoints_are_kept(options, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(progress_callback.TrainingProgress, "on_log", interrupted_at(11))
        with pytest.raises(KeyboardInterrupt):
            train(options(save_steps=2, keep=3))
    assert len(list(work_folder(tmp_path / "adapter").glob("checkpoint-*"))) == 3


def tokenized(model: Path, stories: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [json.loads(line)["text"] for line in stories.read_text().splitlines()]
    return [[*tokenizer(text).input_ids, tokenizer.eos_token_id][:48] for text in texts]


@torch.no_grad()
def loss_on(model: torch.nn.Module, examples: list[Example]) -> float:
    """Mean over tokens, one example at a time."""
    total = count = 0.0
    for one in examples:
        ids = torch.tensor([one.input_ids])
        predictions = model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
        total -= predictions.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    return total / count


def test_an_adapter_that_is_not_finite_is_not_written(options, tmp_path):
    """The last update comes after the last loss."""
    with pytest.raises(SppError, match="the last step made the trained weights NaN or infinite"):
        train(options(learning_rate=1e300, warmup_ratio=0, max_steps=1))
    assert not (tmp_path / "adapter").exists()


def test_the_tokenizer_of_another_model(options, pruned, tiny_model, tmp_path):
    tiny_model("llama", vocab_size=40).save_pretrained(pruned)
    with pytest.raises(UsageError, match=r"token id \d+, but the model knows 40 tokens"):
        train(options())


def test_a_hub_id_is_kept_and_not_looked_up(options, pruned, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("spp.training.train.resolve_model", lambda model, **_: asked.append(model) or pruned)
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *_, **__: pytest.fail("asked"))
    train(options(model="someone/llama-2of4", max_steps=3, save_steps=1))
    assert asked == ["someone/llama-2of4"]  # once: two answers could be of two revisions
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["base_model_name_or_path"] == "someone/llama-2of4"


def test_no_pad_token_is_needed(options, pruned, tmp_path):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (pruned / name).is_file():
            config = read_json(pruned / name)
            (pruned / name).write_text(json.dumps({key: value for key, value in config.items() if key != "pad_token"}))
    assert train(options(max_steps=1)).steps == 1


@pytest.mark.slow
def test_two_processes_are_one_batch(options, pruned, stories, tmp_path):
    settings = ["--window", "48", "--max-steps", "4", "--r", "4", "--learning-rate", "0.3", "--device", "cpu"]
    words = ["-m", "spp", "train", str(pruned), str(tmp_path / "two"), "--data", str(stories), *settings]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, *words], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    train(options("one", max_steps=4))
    for key, ours in factors(tmp_path / "two").items():
        torch.testing.assert_close(ours, factors(tmp_path / "one")[key], rtol=1e-3, atol=1e-4)


def test_batch_sizes_that_do_not_divide(options, tmp_path):
    with pytest.raises(UsageError, match="device-batch-size 3 does not divide"):
        train(options(batch_size=8, device_batch_size=3))
    assert train(options(batch_size=12, max_steps=1)).batch_size == 12
    assert not work_folder(tmp_path / "adapter").exists()


def test_nothing_to_learn(options, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "long " * 30, "completion": "end"}) + "\n")
    with pytest.raises(UsageError, match="no example with a token to predict within 48 tokens"):
        train(options(data=str(data), completion_only=True))
    with pytest.raises(UsageError, match="window 100 is longer than the model's context of 64"):
        train(options(window=100))


def test_a_finished_adapter_is_not_overwritten(options, tmp_path):
    train(options(max_steps=1))
    with pytest.raises(UsageError, match="not empty.*--overwrite"):
        train(options(max_steps=1))
    before = factors(tmp_path / "adapter")
    train(options(max_steps=3, overwrite=True))
    assert any(not torch.equal(before[key], value) for key, value in factors(tmp_path / "adapter").items())


def test_a_full_disk_during_a_checkpoint_loses_nothing(options, monkeypatch, tmp_path):
    train(options("whole", save_steps=4))
    save = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-8" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return save(value, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(SppError, match="no space is left.*checkpoints are kept.*repeat the command"):
            train(options("again", save_steps=4))
    assert not (tmp_path / "again").exists()
    train(options("again", save_steps=4))
    assert same(tmp_path / "whole", tmp_path / "again")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_moments_it_resumes_to_the_bit(options, tmp_path):
    """Ten times SIGKILL, anywhere from the start of the process to its end."""
    asked = options("whole", save_steps=3, max_steps=40, validation=10)
    chance = random.Random(0)

    def command(out: str) -> list[str]:
        values = {name: getattr(asked, name) for name in ("data", "window", "learning_rate", "max_steps", "r")}
        values |= {"save_steps": 3, "validation": 10}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
        return [sys.executable, "-m", "spp", "train", asked.model, str(tmp_path / out), *flags]

    began = time.perf_counter()
    subprocess.run(command("whole"), check=True, capture_output=True)
    seconds = time.perf_counter() - began
    killed = 0
    for number in range(10):
        try:
            subprocess.run(command(f"{number}"), timeout=chance.uniform(0.2, 1.0) * seconds, capture_output=True)
        except subprocess.TimeoutExpired:  # which kills it
            killed += 1
        if not (tmp_path / f"{number}").exists():
            subprocess.run(command(f"{number}"), check=True, capture_output=True)
        assert same(tmp_path / "whole", tmp_path / f"{number}")
        assert not (work_folder(tmp_path / f"{number}")).exists()
    assert killed >= 5
