"""The options of `spp train` and `spp cache-teacher`."""

from __future__ import annotations

import pytest
from test_options_reach import (
    Row,
    check,
    device_row,
    error,
    json_row,
    out_row,
    overwrite_row,
    report,
    seen,
    setting,
    tensors,
    trust_rows,
    written,
)
from test_options_reach_stock import Outcome
from transformers.training_args import OptimizerNames

TEACHER = "--teacher other"
HUB_MODEL = "someone/pruned"
HUB_TEACHER = f"--teacher {HUB_MODEL}"
CACHED = "--teacher answers"
CONFIG = "adapter_config.json"
FULL = "--method full"
TWO_EPOCHS = "--epochs 2"  # of three steps each


def shapes_by_layer(outcome: Outcome) -> dict[str, int]:
    """Row groups of every kind of layer."""
    return {"": setting(CONFIG, "r")(outcome), **setting(CONFIG, "rank_pattern")(outcome)}


def evaluated_steps(outcome: Outcome) -> list[int]:
    """After which steps the loss on what is held out was computed."""
    return [step for step, _ in report("validation")(outcome)]


ROWS = [
    Row("train", "model", "model=half", tensors),
    out_row("train"),
    Row("train", "data", "--data others.jsonl", tensors),
    Row("train", "columns", "--columns text=body", seen("examples"), "--data columns.jsonl"),
    Row("train", "columns", "--columns text=body", seen("examples"), "--data columns.jsonl --max-tokens 100"),
    json_row("train"),
    Row("train", "dry_run", "--dry-run", written, after=[]),
    Row("train", "recipe", "--recipe recipe.yaml", setting(CONFIG, "init_weights"), after="published"),
    Row("train", "recipe", "--recipe recipe.yaml", tensors),
    overwrite_row("train"),
    device_row("train"),
    Row("train", "dtype", "--dtype float32", tensors, "--dtype bfloat16"),
    Row("train", "dtype", "--dtype float32", seen("dtypes"), f"{TEACHER} --dtype bfloat16", after={"torch.float32"}),
    *trust_rows("train"),
    Row("train", "trust_remote_code", "--trust-remote-code", seen("downloads"), HUB_TEACHER, after={(HUB_MODEL, True)}),
    # The order of the examples; the start of A, and dropout, where all examples are the same; what is held out.
    Row("train", "seed", "--seed 1", tensors),
    Row("train", "seed", "--seed 1", tensors, "--init-weights published --data copies.jsonl"),
    Row("train", "seed", "--seed 1", tensors, "--dropout 0.5 --data copies.jsonl"),
    Row("train", "seed", "--seed 1", seen("held_out"), "--validation 4"),
    Row("train", "window", "--window 16", seen("examples")),
    Row("train", "teacher", TEACHER, tensors),
    Row("train", "teacher", CACHED, tensors, TEACHER),
    Row("train", "teacher_weight", "--teacher-weight 0.9", tensors, TEACHER),
    Row("train", "teacher_temperature", "--teacher-temperature 3", tensors, TEACHER),
    Row("train", "teacher_temperature", "--teacher-temperature 3", error("at 3.0"), CACHED, after=True, codes=(0, 2)),
    Row("train", "teacher_features", "--teacher-features 1", tensors, TEACHER),
    Row("train", "teacher_features", "--teacher-features 1", error("features"), CACHED, after=True, codes=(0, 2)),
    Row("train", "join_documents", "--join-documents", seen("examples"), "--no-join-documents"),
    Row("train", "max_tokens", "--max-tokens 100", seen("examples")),
    Row("train", "completion_only", "--completion-only", seen("examples"), "--data answers.jsonl"),
    Row("train", "completion_only", "--completion-only", seen("examples"), "--data answers.jsonl --max-tokens 100"),
    Row("train", "r", "--r 2", shapes_by_layer, after={"": 2}),
    Row("train", "r", "--r 2", tensors),
    Row("train", "lora_rank", "--lora-rank 4", tensors),
    Row("train", "directions", "--directions 2", tensors, "--r 2"),
    # What merging reads, and what training computes with.
    Row("train", "scale", "--scale 4", setting(CONFIG, "scale"), after=4.0),
    Row("train", "scale", "--scale 4", tensors),
    Row("train", "init_weights", "--init-weights published", tensors),
    Row("train", "mode", "--mode split", tensors),
    Row("train", "dropout", "--dropout 0.5", tensors),
    Row("train", "target_modules", "--target-modules q_proj,v_proj", tensors),
    Row("train", "method", "--method full", report("method"), after="full"),
    Row("train", "method", "--method full", setting("spp.json", "kind"), after="merged"),
    Row(
        "train", "rounding", "--rounding stochastic", setting("verification.json", "rounding"), FULL, after="stochastic"
    ),
    Row("train", "rounding", "--rounding stochastic", error("not rounded"), after=True, codes=(0, 2)),
    Row("train", "learning_rate", "--learning-rate 0.1", tensors),
    Row("train", "learning_rate", "--learning-rate 0.1", report("learning_rate"), after=0.1),
    Row("train", "weight_decay", "--weight-decay 0.5", tensors),
    Row("train", "weight_decay", "--weight-decay 0.5", seen("weight_decay")),
    Row("train", "warmup_ratio", "--warmup-ratio 0.9", tensors),
    Row("train", "warmup_ratio", "--warmup-ratio 1", tensors),
    Row("train", "schedule", "--schedule cosine", tensors, TWO_EPOCHS),
    Row("train", "schedule", "--schedule constant", tensors),
    Row("train", "epochs", TWO_EPOCHS, report("steps"), after=6),
    Row("train", "max_steps", "--max-steps 2", report("steps"), after=2),
    Row("train", "batch_size", "--batch-size 6", tensors),
    Row("train", "batch_size", "--batch-size 6", report("batch_size"), after=6),
    Row("train", "device_batch_size", "--device-batch-size 2", seen("batches"), after={2}),
    Row("train", "gradient_checkpointing", "--gradient-checkpointing", seen("checkpointing"), after=True),
    Row("train", "pack", "--pack", report("packed"), "--no-pack", after=14),
    Row("train", "quantize", "--quantize int8", seen("quantize"), after="int8"),
    Row("train", "optimizer", "--optimizer adamw-8bit", seen("optimizer"), after=OptimizerNames.ADAMW_BNB),
    Row("train", "save_steps", "--save-steps 2", seen("checkpoints"), TWO_EPOCHS, after={2: [2], 4: [2, 4]}),
    Row("train", "keep", "--keep 1", seen("checkpoints"), f"{TWO_EPOCHS} --save-steps 2", after={2: [2], 4: [4]}),
    Row("train", "save_steps", "--save-steps 1", evaluated_steps, "--validation 4 --max-steps 2", after=[0, 1, 2]),
    Row("train", "validation", "--validation 4", seen("held_out")),
    Row("train", "validation", "--validation 4", report("examples"), after=8),
    Row("train", "validation", "--validation 4", evaluated_steps, "--max-steps 2", after=[0, 2]),
    Row("train", "eval_steps", "--eval-steps 1", evaluated_steps, "--validation 4 --max-steps 2", after=[0, 1, 2]),
    # One process cannot divide a model; tests/training/test_distributed.py has several.
    Row("train", "sharding", "--sharding fsdp", error("sharding fsdp"), after=True, codes=(0, 2)),
    Row("train", "report_to", "--report-to tensorboard", seen("logged")),
    Row("cache-teacher", "model", "model=other", tensors),
    out_row("cache-teacher"),
    Row("cache-teacher", "data", "--data others.jsonl", tensors),
    Row("cache-teacher", "columns", "--columns text=body", tensors, "--data columns.jsonl"),
    json_row("cache-teacher"),
    overwrite_row("cache-teacher"),
    device_row("cache-teacher"),
    Row("cache-teacher", "dtype", "--dtype float32", tensors, "--dtype bfloat16"),
    *trust_rows("cache-teacher"),
    Row("cache-teacher", "window", "--window 16", tensors),
    Row("cache-teacher", "join_documents", "--join-documents", tensors, "--no-join-documents"),
    Row("cache-teacher", "max_tokens", "--max-tokens 100", tensors),
    Row("cache-teacher", "completion_only", "--completion-only", tensors, "--data answers.jsonl"),
    Row("cache-teacher", "top_k", "--top-k 8", tensors),
    Row("cache-teacher", "top_k", "--top-k 8", setting("spp.json", "top_k"), after=8),
    Row("cache-teacher", "top_k", "--top-k 97", error("top-k 97"), after=True, codes=(0, 2)),  # of 96 tokens
    Row("cache-teacher", "temperature", "--temperature 3", tensors),
    Row("cache-teacher", "temperature", "--temperature 3", setting("spp.json", "temperature"), after=3.0),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_option_reaches_its_consumer(row: Row, request: pytest.FixtureRequest) -> None:
    check(row, request)
