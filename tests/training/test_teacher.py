"""Learning from the dense model: the loss by hand, from a model and from a cache, accumulation, resume, misuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from spp.checkpoints.atomic_folder import work_folder
from spp.checkpoints.json_files import read_json
from spp.cli.entry_point import main
from spp.errors import SppError, UsageError
from spp.pruning.options import PruneOptions
from spp.pruning.prune import prune
from spp.training import progress_callback
from spp.training.memory_estimate import predict_training
from spp.training.options import CacheTeacherOptions, TrainOptions
from spp.training.teacher_cache import cache_teacher
from spp.training.train import train

MakeModel = Callable[..., PreTrainedModel]
Make = Callable[..., TrainOptions]


@pytest.fixture
def pruned(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    prune(PruneOptions.build({"model": str(tiny_checkpoint), "out": tmp_path / "pruned", "criterion": "magnitude"}))
    return tmp_path / "pruned"


@pytest.fixture
def options(pruned: Path, tiny_checkpoint: Path, stories: Path, tmp_path: Path) -> Make:
    def make(out: str = "adapter", **changes: Any) -> TrainOptions:
        values = {"model": str(pruned), "out": tmp_path / out, "data": str(stories), "window": 48}
        values |= {"learning_rate": 0.1, "max_steps": 3, "r": 4, "teacher": str(tiny_checkpoint)}
        return TrainOptions.build({**values, **changes})

    return make


@pytest.fixture
def cache(tiny_checkpoint: Path, stories: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(out: str = "answers", **changes: Any) -> Path:
        values = {"model": str(tiny_checkpoint), "out": tmp_path / out, "data": str(stories), "window": 48}
        return cache_teacher(CacheTeacherOptions.build({**values, "top_k": 96, **changes})).out

    return make


def factors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


@torch.no_grad()
def by_hand(options: TrainOptions, text: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """The parts of the first loss, for batches of one text: the adapter does nothing yet."""
    ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
    found = [
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids, output_hidden_states=True)
        for model in (options.model, options.teacher)
    ]
    student, teacher = (one.logits[0, :-1].double().log_softmax(dim=-1) for one in found)
    features = [
        ((s[0, :-1] - t[0, :-1]).square().sum(dim=-1) / t[0, :-1].square().sum(dim=-1)).mean()
        for s, t in zip(*(one.hidden_states[1:] for one in found), strict=True)
    ]
    return {
        "data": F.nll_loss(student, ids[0, 1:]).item(),
        "teacher": (teacher.exp() * (teacher - student)).sum(dim=-1).mean().item(),
        "features": torch.stack(features).mean().item(),
    }


@pytest.mark.parametrize(("weight", "features"), [(0.5, 0.0), (1.0, 0.0), (0.0, 0.0), (0.3, 2.0)])
def test_the_loss_is_the_mixture(
    options: Make, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, weight: float, features: float
) -> None:
    (tmp_path / "one.jsonl").write_text((json.dumps({"text": "The cat sat."}) + "\n") * 8)
    asked = options(
        data=str(tmp_path / "one.jsonl"),
        max_steps=1,
        teacher_weight=weight,
        teacher_features=features,
        join_documents=False,
    )
    parts = by_hand(asked, "The cat sat.", tiny_tokenizer)
    expected = (1 - weight) * parts["data"] + weight * parts["teacher"] + features * parts["features"]
    assert train(asked).losses[0][1] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_share_of_zero_is_training_without_a_teacher(options: Make) -> None:
    with_teacher = train(options("with", teacher_weight=0.0))
    without = train(options("without", teacher=None))
    for (_, ours), (_, theirs) in zip(with_teacher.losses, without.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_cache_of_everything_teaches_what_the_model_teaches(options: Make, cache: Callable[..., Path]) -> None:
    live = train(options("live", dtype="float32"))
    cached = train(options("cached", teacher=str(cache()), dtype="float32"))
    for (_, ours), (_, theirs) in zip(cached.losses, live.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    for name, tensor in factors(cached.out).items():
        torch.testing.assert_close(tensor, factors(live.out)[name], rtol=0.05, atol=5e-3)


def test_a_few_tokens_teach_too(options: Make, cache: Callable[..., Path]) -> None:
    """Each example gets its own answers: in another order of batches, the losses would be larger than without."""
    report = train(options(teacher=str(cache(top_k=8)), teacher_weight=1.0, max_steps=30, teacher_temperature=None))
    first, last = (sum(loss for _, loss in part) for part in (report.losses[:5], report.losses[-5:]))
    assert last < 0.8 * first


def test_the_cache_says_what_it_is(cache: Callable[..., Path], tiny_checkpoint: Path) -> None:
    out = cache(top_k=5, temperature=2.0)
    manifest = read_json(out / "spp.json")
    assert manifest["kind"] == "teacher-cache" and manifest["model"] == str(tiny_checkpoint)
    assert (manifest["top_k"], manifest["temperature"], manifest["vocabulary"]) == (5, 2.0, 96)
    tensors = load_file(out / "teacher.safetensors")
    assert len(tensors) == 2 * -(-200 // 64)
    for part in range(4):
        tokens, known = tensors[f"tokens.{part}"], tensors[f"log_probabilities.{part}"]
        assert tokens.shape == known.shape and tokens.shape[1] == 5
        assert ((known.float().exp().sum(dim=1) < 1) & (known.diff(dim=1) <= 0).all(dim=1)).all()


@pytest.mark.parametrize("cached", [False, True], ids=["model", "cache"])
def test_accumulation_is_one_batch(options: Make, cache: Callable[..., Path], cached: bool) -> None:
    teacher = {"teacher": str(cache())} if cached else {"teacher_features": 0.5}
    whole = train(options("whole", batch_size=6, device_batch_size=6, **teacher))
    parts = train(options("parts", batch_size=6, device_batch_size=2, **teacher))
    for (_, ours), (_, theirs) in zip(parts.losses, whole.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_killed_run_resumes_to_the_bit(
    options: Make, cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"teacher": str(cache(top_k=16)), "max_steps": 8, "save_steps": 3}
    whole = train(options("whole", **settings))

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(progress_callback.TrainingProgress, "on_log", interrupted)
        train(options("again", **settings))
    again = train(options("again", **settings))
    assert again.losses == whole.losses
    assert all(tensor.equal(factors(whole.out)[name]) for name, tensor in factors(again.out).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "other"}, "asked about other examples.*the same --data"),
        ({"window": 20}, "asked about other examples"),
        ({"teacher_temperature": 3.0}, r"at temperature 1.0, and not at 3.0; leave out --teacher-temperature"),
        ({"teacher_features": 1.0}, "teacher-features needs a model"),
    ],
)
def test_a_cache_that_does_not_fit(
    options: Make, cache: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "Quite another story."}) + "\n")
    if "data" in changes:
        changes = {"data": str(tmp_path / "other.jsonl")}
    with pytest.raises(UsageError, match=message):
        train(options(teacher=str(cache()), **changes))
    assert not (tmp_path / "adapter").exists() and not work_folder(tmp_path / "adapter").exists()


def test_a_teacher_with_another_vocabulary(options: Make, tiny_model: MakeModel, tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=128).save_pretrained(tmp_path / "larger")
    with pytest.raises(UsageError, match="a vocabulary of 128 tokens, and the model one of 96; take the dense model"):
        train(options(teacher=str(tmp_path / "larger")))


def test_settings_without_a_teacher() -> None:
    with pytest.raises(UsageError, match="teacher-weight, teacher-features: there is no teacher.*--teacher"):
        TrainOptions.build({"model": "m", "out": "o", "teacher_weight": 0.7, "teacher_features": 1.0})


def test_more_tokens_than_there_are(cache: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="top-k 97 is more than the 96 tokens of the vocabulary"):
        cache(top_k=97)


def test_a_teacher_that_predicts_nan(cache: Callable[..., Path], tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(SppError, match="predicts NaN or infinity"):
        cache()
    assert not (tmp_path / "answers").exists()


def test_the_prediction_of_memory_has_the_teacher(options: Make, cache: Callable[..., Path]) -> None:
    alone = predict_training(options(teacher=None)).parts
    live, cached = (predict_training(options(teacher=one)).parts for one in (options().teacher, str(cache())))
    assert live["teacher"] > 4 * 2 * 32 * 32  # fp32 on a CPU, two layers and more
    assert cached.keys() - alone.keys() == {"comparing predictions"} == live.keys() - alone.keys() - {"teacher"}


def test_on_the_command_line(
    pruned: Path, tiny_checkpoint: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, adapter = str(tmp_path / "answers"), str(tmp_path / "adapter")
    data = ["--data", str(stories), "--window", "48"]
    assert main(["cache-teacher", str(tiny_checkpoint), answers, *data, "--top-k", "8"]) == 0
    assert f"--teacher {answers}" in capsys.readouterr().out
    assert main(["train", str(pruned), adapter, *data, "--teacher", answers, "--max-steps", "2"]) == 0
    assert main(["train", str(pruned), adapter, *data, "--teacher-weight", "0.5", "--overwrite"]) == 0
