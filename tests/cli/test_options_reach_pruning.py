"""The options of `spp prune`."""

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
    tensors,
    trust_rows,
    written,
)

RECONSTRUCT = "--reconstruct block"
FACTORS = f"{RECONSTRUCT} --reconstruct-params spp"
MAGNITUDE = "--criterion magnitude"  # which looks at no calibration by itself

ROWS = [
    Row("prune", "model", "model=other", tensors),
    out_row("prune"),
    json_row("prune"),
    Row("prune", "dry_run", "--dry-run", written, after=[]),
    overwrite_row("prune"),
    device_row("prune"),
    Row("prune", "dtype", "--dtype bfloat16", tensors, "--criterion sparsegpt"),
    *trust_rows("prune"),
    Row("prune", "seed", "--seed 1", tensors),
    # Of a text of one window, every seed draws that one, so that only the start of A and B is left to differ.
    Row(
        "prune",
        "seed",
        "--seed 1",
        tensors,
        f"{FACTORS} --calibration one-window.jsonl --samples 1",
        same=report("calibration", "sha256"),
    ),
    Row("prune", "window", "--window 16", tensors),
    Row("prune", "pattern", "--pattern 4:8", tensors),
    Row("prune", "pattern", "--pattern 4:8", report("pattern"), after="4:8"),
    Row("prune", "equal_rows", "--equal-rows", tensors, f"{MAGNITUDE} --pattern 5%"),
    Row("prune", "criterion", "--criterion ria", tensors),
    Row("prune", "criterion", "--criterion ria", report("criterion"), after="ria"),
    Row("prune", "allocation", "--allocation owl", tensors, f"{MAGNITUDE} --pattern 50%"),
    Row("prune", "owl_limit", "--owl-limit 0.2", tensors, "--pattern 50% --allocation owl"),
    Row("prune", "owl_threshold", "--owl-threshold 2", tensors, "--pattern 50% --allocation owl"),
    Row("prune", "refine", "--refine dsnot", tensors),
    Row("prune", "refine", "--refine swaps", tensors),
    Row("prune", "refine", "--refine dsnot", error("dsnot"), "--criterion sparsegpt", after=True, codes=(0, 2)),
    Row("prune", "update", "--update least-squares", tensors),
    Row("prune", "update", "--update admm", tensors, "--refine swaps"),
    Row("prune", "update", "--update sparsegpt", error("sparsegpt"), "--criterion sparsegpt", after=True, codes=(0, 2)),
    Row("prune", "reconstruct", RECONSTRUCT, tensors, MAGNITUDE),
    Row("prune", "reconstruct_params", "--reconstruct-params spp", tensors, RECONSTRUCT),
    Row("prune", "reconstruct_epochs", "--reconstruct-epochs 2", tensors, RECONSTRUCT),
    Row("prune", "reconstruct_learning_rate", "--reconstruct-learning-rate 0.01", tensors, RECONSTRUCT),
    Row("prune", "reconstruct_learning_rate", "--reconstruct-learning-rate 0.01", tensors, FACTORS),
    Row("prune", "reconstruct_r", "--reconstruct-r 4", tensors, FACTORS),
    Row("prune", "reconstruct_directions", "--reconstruct-directions 2", tensors, FACTORS),
    Row("prune", "reconstruct_scale", "--reconstruct-scale 1.0", tensors, FACTORS),
    Row("prune", "reconstruct_start", "--reconstruct-start ones", tensors, FACTORS),
    Row("prune", "keep_zeros", "--keep-zeros", tensors, "model=half"),
    Row("prune", "keep_zeros", "--keep-zeros", report("criterion"), "model=half", after=None),
    Row("prune", "calibration", "--calibration others.jsonl", tensors),
    Row("prune", "columns", "--columns text=body", tensors, "--calibration columns.jsonl"),
    Row("prune", "samples", "--samples 2", tensors),
    Row("prune", "min_expert_tokens", "--min-expert-tokens 0", tensors, "model=moe"),
    Row("prune", "skip_indivisible", "--skip-indivisible", report("skipped"), "model=odd --pattern 2:8", codes=(2, 0)),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_option_reaches_its_consumer(row: Row, request: pytest.FixtureRequest) -> None:
    check(row, request)
