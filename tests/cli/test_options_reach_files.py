"""The options of commands on files: adapters, archives, the hub, the report."""

from __future__ import annotations

import pytest
from test_options_reach import (
    Row,
    check,
    error,
    json_row,
    out_row,
    overwrite_row,
    report,
    seen,
    setting,
    tensors,
    users_files,
    written,
)
from test_options_reach_stock import Outcome

CONFIG = "adapter_config.json"
MANIFEST = "spp.json"
TRUST, OWN_CODE = "trust_remote_code", "--trust-remote-code"
CALIBRATED = "--bits 3 --calibration stories.jsonl --window 32 --samples 4"
RECORD, OTHER_RECORD = (f"--record {name}/verification.json" for name in ("merged", "merged-of-others"))
INFINITE = "base=infinite other=infinite"


def page(outcome: Outcome) -> str:
    return outcome.out.with_suffix(".html").read_text()


ROWS = [
    Row("merge", "model", "model=half", tensors),
    Row("merge", "adapter", "adapter=adapter-of-others", tensors),
    # What the scale of training is for, in the end: nothing but the setting differs.
    Row("merge", "adapter", "adapter=adapter-of-scale-4", tensors),
    out_row("merge"),
    json_row("merge"),
    overwrite_row("merge"),
    Row("merge", "seed", "--seed 1", tensors, "--rounding stochastic"),
    Row("merge", "rounding", "--rounding stochastic", tensors),
    Row("merge", "dtype", "--dtype float32", tensors),
    Row("merge", "allow_nonfinite", "--allow-nonfinite", written, "model=infinite", after=[""], codes=(1, 0)),
    Row("merge", "allow_dense", "--allow-dense", written, "model=dense", after=[""], codes=(1, 0)),
    Row("convert", "adapter", "adapter=adapter-of-others", tensors),
    out_row("convert"),
    json_row("convert"),
    overwrite_row("convert"),
    Row("convert", "to", "--to hira", setting(CONFIG, "peft_type"), "adapter=published", after="HIRA"),
    Row(
        "convert",
        "base",
        "--base pruned",
        setting(CONFIG, "base_model_name_or_path"),
        "adapter=published",
        after="pruned",
    ),
    Row("convert", "base", "--base odd", error("odd"), after=True, codes=(0, 1)),
    Row("verify", "base", "base=half", report("verified"), after=False, codes=(0, 1)),
    Row("verify", "other", "other=dense", report("verified"), after=False, codes=(0, 1)),
    json_row("verify"),
    Row("verify", "pattern", "--pattern 1:4", report("verified"), after=False, codes=(0, 1)),
    Row("verify", "targets", "--targets q_proj", report("problems"), "--pattern 1:4", codes=(1, 1)),
    Row("verify", "record", RECORD, report("verified"), "base=merged other=", after=True, codes=(2, 0)),
    Row(
        "verify", "record", OTHER_RECORD, report("verified"), f"base=merged other= {RECORD}", after=False, codes=(0, 1)
    ),
    Row("verify", "allow_nonfinite", "--allow-nonfinite", report("verified"), INFINITE, after=True, codes=(1, 0)),
    Row(
        "verify", "allow_dense", "--allow-dense", report("verified"), "base=dense other=dense", after=True, codes=(1, 0)
    ),
    Row("pack", "model", "model=half", tensors),
    out_row("pack"),
    json_row("pack"),
    overwrite_row("pack"),
    Row("pack", "bits", "--bits 4", tensors),
    # The tiny model has no row of more than 64 columns, for which it would make a difference.
    Row("pack", "group", "--group 64", setting(MANIFEST, "few_bits", "group"), "--bits 4", after=64),
    Row("pack", "calibration", "--calibration others.jsonl", tensors, CALIBRATED),
    Row("pack", "samples", "--samples 8", setting(MANIFEST, "few_bits", "calibration", "samples"), CALIBRATED, after=8),
    Row("pack", "window", "--window 16", setting(MANIFEST, "few_bits", "calibration", "window"), CALIBRATED, after=16),
    Row("pack", "seed", "--seed 1", setting(MANIFEST, "few_bits", "calibration", "sha256"), CALIBRATED),
    Row("pack", "dtype", "--dtype bfloat16", setting(MANIFEST, "few_bits", "errors_of_outputs"), CALIBRATED),
    Row(
        "pack",
        "columns",
        "--columns text=body",
        tensors,
        "--bits 3 --window 32 --samples 4 --calibration columns.jsonl",
    ),
    Row("pack", TRUST, OWN_CODE, error("trust-remote-code"), f"model=own-pack {CALIBRATED}", after=False, codes=(2, 2)),
    Row("pack", TRUST, OWN_CODE, seen("downloads"), "model=someone/pruned", after={("someone/pruned", True)}),
    Row("pack", "device", "--device meta", error("'meta'"), CALIBRATED, after=True, codes=(0, 2)),
    Row("unpack", "model", "model=packed-half", tensors),
    out_row("unpack"),
    json_row("unpack"),
    overwrite_row("unpack"),
    Row("inspect", "model", "model=half", report()),
    json_row("inspect"),
    Row("push", "model", "model=pruned", seen("uploads")),
    Row("push", "repo", "repo=someone/else", seen("uploads")),
    Row("push", "private", "--private", seen("uploads")),
    json_row("push"),
    Row("report", "runs", "runs=runs/first+runs/second", page),
    Row("report", "out", "to={out}-elsewhere.html", written, after=["-elsewhere.html"]),
    Row("report", "benchmarks", "--benchmarks layer.csv", page),
    Row("report", "overwrite", "--overwrite", users_files, "to={taken}/page.html", after=["plot.svg"], codes=(2, 0)),
    json_row("report"),
    json_row("doctor"),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_option_reaches_its_consumer(row: Row, request: pytest.FixtureRequest) -> None:
    check(row, request)
