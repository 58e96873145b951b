"""The options of `spp run`: what its stages are given. What they do with that, the rows of their own commands show."""

from __future__ import annotations

import pytest
from test_options_reach import Look, Row, check, device_row, error, json_row, out_row, seen, trust_rows
from test_options_reach_stock import Outcome

TEACHER = "--teacher other"
HUB_MODEL = "someone/pruned"
HUB_TEACHER = f"--teacher {HUB_MODEL}"


def given_to_stages(option: str, *stages: str) -> Look:
    """All values of an option that stages have, or those of these names that have it."""

    def look(outcome: Outcome) -> set[str]:
        return {
            str(getattr(options, option))
            for stage, options in outcome.seen["stages"]
            if option in type(options).model_fields and stage in (stages or (stage,))
        }

    return look


def dense_model(outcome: Outcome) -> str:
    """What the first stage evaluates."""
    return outcome.seen["stages"][0][1].model


HANDED_ON = [
    ("seed", "--seed 1"),
    ("window", "--window 16"),
    ("per_document", "--per-document"),
    ("limit", "--limit 2"),
    ("stream", "--stream"),
    ("bos", "--bos always"),
    ("columns", "--columns text=body"),
    ("rounding", "--rounding stochastic"),
    ("teacher", TEACHER),
    ("teacher_weight", "--teacher-weight 0.9"),
    ("teacher_temperature", "--teacher-temperature 3.0"),
    ("teacher_features", "--teacher-features 1.0"),
    ("join_documents", "--join-documents"),
    ("max_tokens", "--max-tokens 100"),
    ("completion_only", "--completion-only"),
    ("r", "--r 2"),
    ("lora_rank", "--lora-rank 4"),
    ("directions", "--directions 2"),
    ("scale", "--scale 4.0"),
    ("init_weights", "--init-weights published"),
    ("mode", "--mode split"),
    ("dropout", "--dropout 0.5"),
    ("target_modules", "--target-modules q_proj,v_proj"),
    ("method", "--method full"),
    ("learning_rate", "--learning-rate 0.1"),
    ("weight_decay", "--weight-decay 0.5"),
    ("warmup_ratio", "--warmup-ratio 0.9"),
    ("schedule", "--schedule cosine"),
    ("epochs", "--epochs 2.0"),
    ("max_steps", "--max-steps 3"),
    ("device_batch_size", "--device-batch-size 2"),
    ("gradient_checkpointing", "--gradient-checkpointing"),
    ("pack", "--pack"),
    ("quantize", "--quantize int8"),
    ("optimizer", "--optimizer adamw-8bit"),
    ("save_steps", "--save-steps 2"),
    ("keep", "--keep 1"),
    ("validation", "--validation 4"),
    ("eval_steps", "--eval-steps 1"),
    ("report_to", "--report-to tensorboard"),
    ("pattern", "--pattern 4:8"),
    ("equal_rows", "--equal-rows"),
    ("criterion", "--criterion ria"),
    ("allocation", "--allocation owl"),
    ("owl_limit", "--owl-limit 0.2"),
    ("owl_threshold", "--owl-threshold 2.0"),
    ("refine", "--refine dsnot"),
    ("update", "--update admm"),
    ("reconstruct", "--reconstruct block"),
    ("reconstruct_params", "--reconstruct-params spp"),
    ("reconstruct_epochs", "--reconstruct-epochs 2"),
    ("reconstruct_learning_rate", "--reconstruct-learning-rate 0.01"),
    ("reconstruct_r", "--reconstruct-r 4"),
    ("reconstruct_directions", "--reconstruct-directions 2"),
    ("reconstruct_scale", "--reconstruct-scale 1.0"),
    ("reconstruct_start", "--reconstruct-start ones"),
    ("keep_zeros", "--keep-zeros"),
    ("calibration", "--calibration others.jsonl"),
    ("samples", "--samples 2"),
    ("min_expert_tokens", "--min-expert-tokens 0"),
    ("skip_indivisible", "--skip-indivisible"),
]
"""Options that stages have by the same name, and how to change them."""


def handed_on(option: str, change: str) -> Row:
    _, _, value = change.partition(" ")
    # verify gets the pattern, too, from the pruned model's manifest; an adapter is rounded when it is merged
    stages = {"pattern": ("prune",), "rounding": ("merge",)}.get(option, ())
    needed = {"allocation": "--pattern 50%", "columns": "--train columns.jsonl --eval columns.jsonl"}
    given = needed.get(option, TEACHER if option.startswith("teacher_") else "")
    after = {value or "True"}
    if option == "reconstruct":
        after.add("None")  # for the mask alone, from which the gap is counted
    return Row("run", option, change, given_to_stages(option, *stages), given, after=after)


ROWS = [
    *(handed_on(option, change) for option, change in HANDED_ON),
    Row("run", "rounding", "--rounding stochastic", given_to_stages("rounding"), "--method full", after={"stochastic"}),
    Row("run", "calibration_window", "--calibration-window 16", given_to_stages("window", "prune"), after={"16"}),
    Row("run", "eval_window", "--eval-window 16", given_to_stages("window", "evaluate"), after={"16"}),
    Row("run", "eval_window", "--eval-window context", given_to_stages("window", "evaluate"), after={"64"}),
    json_row("run"),
    Row("run", "recipe", "recipe=recipe.yaml", given_to_stages("seed"), after={"7"}),
    Row("run", "model", "model=other", dense_model, after="other"),
    Row("run", "effort", "--effort standard", given_to_stages("criterion"), after={"admm"}),
    Row("run", "effort", "--effort best", given_to_stages("teacher"), after={"dense"}),
    Row("run", "train", "--train others.jsonl", given_to_stages("data"), after={"others.jsonl"}),
    # Without --calibration it is calibrated on the same.
    Row("run", "train", "--train others.jsonl", given_to_stages("calibration"), after={"others.jsonl"}),
    Row("run", "eval", "--eval others.jsonl", given_to_stages("text"), after={"others.jsonl"}),
    out_row("run"),
    Row("run", "overwrite", "--overwrite", error("--overwrite"), "to={taken}", after=False, codes=(2, 0)),
    device_row("run"),
    # What is merged keeps its own dtype.
    Row("run", "dtype", "--dtype bfloat16", given_to_stages("dtype", "prune", "train", "evaluate"), after={"bfloat16"}),
    *trust_rows("run"),
    Row("run", "trust_remote_code", "--trust-remote-code", seen("downloads"), HUB_TEACHER, after={(HUB_MODEL, True)}),
    Row("run", "batch_size", "--batch-size 4", given_to_stages("batch_size", "train"), after={"4"}),
    Row("run", "sharding", "--sharding fsdp", error("sharding fsdp"), after=True, codes=(0, 2)),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_option_reaches_its_consumer(row: Row, request: pytest.FixtureRequest) -> None:
    check(row, request)
