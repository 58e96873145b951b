"""The recipes `paper-*` against the published protocol, step by step; the values are those of the published code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from spp.errors import UsageError
from spp.evaluation.evaluate import evaluate
from spp.evaluation.options import EvalOptions
from spp.pipeline import stages as pipeline_stages
from spp.pipeline.options import RunOptions
from spp.pipeline.recipes import load_recipe
from spp.pipeline.stages import Stages
from spp.pruning.options import PruneOptions
from spp.training.options import TrainOptions

# Alpaca-GPT4 has 52,002 examples, of which seed 42 holds 2,000 out; an epoch of the rest has 391 steps of 128.
EXAMPLES, HELD_OUT, STEPS = 52_002, 2_000, 391
OF_7B = {
    # pruned bases, from Wanda's repository: 128 windows of max_position_embeddings
    "samples": 128,
    "calibration_window": "context",
    "equal_rows": True,
    # data
    "window": 512,
    "join_documents": False,
    "completion_only": False,
    # split: evaluation and checkpoint every 200 steps, and the best checkpoint is taken
    "seed": 42,
    "validation": HELD_OUT,
    "eval_steps": 200,
    "save_steps": 200,
    # optimiser: batch 128 = 8 GPUs x 8 x 2
    "learning_rate": 4e-3,
    "weight_decay": 0.001,
    "warmup_ratio": 0.03,
    "schedule": "linear",
    "batch_size": 128,
    "device_batch_size": 8,
    "epochs": 3,
    "max_steps": None,
    # adapter: R = 16, s = alpha 16 / r 8
    "r": 16,
    "directions": 1,
    "scale": 2.0,
    "dropout": 0.05,
    "target_modules": "all-linear",
    "init_weights": "published",
    # base in fp16
    "dtype": "float16",
    # perplexity: Wanda's windows, joined with blank lines, tail dropped; BOS where the tokenizer puts it
    "eval_window": "context",
    "bos": "auto",
    "per_document": None,
    "limit": None,
}
OF_30B = OF_7B | {
    "batch_size": 256,
    "eval_steps": 100,
    "save_steps": 100,
    "dtype": "bfloat16",
    "sharding": "zero3",
    "gradient_checkpointing": True,
}


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [("paper-7b", OF_7B), ("paper-13b", OF_7B), ("paper-30b", OF_30B), ("paper-70b", OF_30B)],
)
def test_a_recipe_has_the_published_values(recipe: str, expected: dict[str, Any]) -> None:
    options = RunOptions.build(load_recipe(recipe))
    assert {name: getattr(options, name) for name in expected} == expected
    assert (str(options.pattern), options.criterion) == ("2:4", "wanda")


def test_the_steps_are_the_published_ones() -> None:
    options = TrainOptions.build({**load_recipe("paper-7b", TrainOptions), "model": "m", "out": "o", "data": "d"})
    an_epoch = math.ceil((EXAMPLES - options.validation) / options.batch_size)
    assert (an_epoch, an_epoch * options.epochs) == (STEPS, 1173)
    assert an_epoch * options.epochs > 5 * (options.eval_steps or 0)  # so that there is a best one to choose


def test_the_rehearsal_differs_in_sizes_alone() -> None:
    whole, rehearsal = (RunOptions.build(load_recipe(name)).model_dump() for name in ("paper-7b", "paper-135m"))
    changed = {name for name, value in whole.items() if rehearsal[name] != value}
    assert changed == {
        "calibration_window", "eval_window", "batch_size", "epochs", "max_steps", "validation", "eval_steps",
        "save_steps", "dtype",
    }  # fmt: skip
    assert rehearsal["validation"] > 0 and rehearsal["eval_steps"] < rehearsal["max_steps"]


@pytest.mark.parametrize("positions", [2048, 4096], ids=["LLaMA", "LLaMA-2"])
def test_each_stage_has_its_own_window(positions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoConfig.for_model("llama", max_position_embeddings=positions).save_pretrained(tmp_path)
    seen: list[Any] = []
    for name in ("prune", "evaluate"):
        monkeypatch.setattr(pipeline_stages, name, seen.append)
    values = load_recipe("paper-7b") | {"train": "alpaca.json", "calibration": "c4.jsonl", "eval": "wiki.txt"}
    stages = Stages(RunOptions.build(values), str(tmp_path), tmp_path, tmp_path / "out")
    work = {stage.name: stage.work for stage in stages.in_order()}
    work["evaluate_dense"]()
    work["prune"]()
    evaluation, pruning = seen
    assert isinstance(evaluation, EvalOptions) and isinstance(pruning, PruneOptions)
    assert (evaluation.window, evaluation.text) == (positions, "wiki.txt")
    assert (pruning.window, pruning.samples, pruning.calibration) == (positions, 128, "c4.jsonl")
    assert (stages.training.window, stages.training.data) == (512, "alpaca.json")


def test_windows_of_stages_are_those_of_the_run_unless_they_are_given() -> None:
    for given, window in (({}, 64), ({"eval_window": 32}, 32)):
        options = RunOptions.build({"window": 64, **given})
        stages = Stages(options, "m", Path("m"), Path("out"))
        assert stages._eval_window == window and stages._calibration_window == 64


@pytest.mark.parametrize("value", ["all", "1", "-5", "1.5", ""])
def test_a_window_is_a_number_or_the_context(value: str) -> None:
    with pytest.raises(UsageError, match="eval_window: a window is a number of tokens, 2 or more, or context"):
        RunOptions.build({"eval_window": value})
    assert RunOptions.build({"eval_window": "64"}).eval_window == 64


def test_the_published_windows_leave_no_tail_and_one_bos(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """The text is joined with blank lines and cut; only the first window has the beginning-of-text token."""
    (text := tmp_path / "wiki.txt").write_text("The cat sat.\n\nThe dog ran. " * 20)
    report = evaluate(EvalOptions(model=str(tiny_checkpoint), text=str(text), window=64))
    tokens = 1 + len(text.read_text())  # a token for each character, and BOS
    assert tokens % 64 and report.windows == tokens // 64 and report.bos == "as the tokenizer adds it"
    assert (report.tokens, report.per_document) == (63 * (tokens // 64), False)


def test_a_recipe_may_be_based_on_another(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("based-on: paper\nr: 8\nseed: 1\n")
    second.write_text(f"based-on: {first}\nseed: 2\n")
    values = load_recipe(str(second))
    assert (values["r"], values["seed"], values["learning_rate"]) == (8, 2, 4e-3)
    first.write_text(f"based-on: {second}\n")
    with pytest.raises(UsageError, match="is based on itself"):
        load_recipe(str(second))
    first.write_text("based-on: [1]\n")
    with pytest.raises(UsageError, match="name one recipe"):
        load_recipe(str(first))
