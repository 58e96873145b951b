"""The options of `spp eval` and `spp generate`."""

from __future__ import annotations

import pytest
from test_options_reach import (
    Row,
    check,
    device_row,
    error,
    json_row,
    report,
    seen,
    trust_rows,
    users_files,
    written,
)
from test_options_reach_stock import Outcome

TASKS = "source= --tasks quiz.jsonl"
BOTH = "others=other"
FROM_HUB = {("someone/pruned", True)}


def models(outcome: Outcome) -> list[str]:
    """Those that were scored, where they are several."""
    return list(report("models")(outcome) or ())


ROWS = [
    Row("eval", "model", "model=half", report("nll")),
    Row("eval", "others", BOTH, models, after=["pruned", "other"]),
    Row("eval", "text", "source=--text+others.jsonl", report("nll")),
    Row("eval", "columns", "--columns text=body", report("nll"), "source=--text+columns.jsonl"),
    Row("eval", "bos", "--bos never", report("nll")),
    Row("eval", "bos", "--bos always", report("nll"), "source=--text+stories.txt"),
    json_row("eval"),
    device_row("eval"),
    Row("eval", "dtype", "--dtype bfloat16", report("nll")),
    *trust_rows("eval"),
    Row("eval", "trust_remote_code", "--trust-remote-code", seen("downloads"), "model=adapter-of-hub", after=FROM_HUB),
    Row("eval", "window", "--window 16", report("nll")),
    Row("eval", "window", "--window 16", report("context"), TASKS, after=16),
    Row("eval", "window", "--window 65", error("window 65"), TASKS, after=True, codes=(0, 2)),  # of 64 positions
    Row("eval", "per_document", "--no-per-document", report("nll")),
    Row("eval", "per_document", "--per-document", report("nll"), "source=--text+stories.txt"),
    Row("eval", "stream", "--stream", report("streamed"), after=True),
    Row("eval", "stream_folder", "--stream-folder {taken}/page.html", error("is a file"), "--stream", codes=(0, 2)),
    Row("eval", "dry_run", "--dry-run", report("states_bytes"), "--stream"),
    Row("eval", "limit", "--limit 4", report("nll")),
    Row("eval", "limit", "--limit 2", report("tasks", "quiz", "items"), TASKS, after=2),
    Row("eval", "limit", "--limit 2", report("limit"), TASKS, after=2),
    Row("eval", "adapter", "--adapter adapter", report("nll")),
    Row("eval", "tasks", "--tasks quizzes/quiz.jsonl", report("tasks"), TASKS),
    Row("eval", "task_folder", "--task-folder riddles", report("tasks"), "source= --tasks quiz --task-folder quizzes"),
    Row("eval", "num_fewshot", "--num-fewshot 1", report("tasks", "quiz", "num_fewshot"), TASKS, after=1),
    Row("eval", "num_fewshot", "--num-fewshot 3", error("--num-fewshot"), TASKS, after=True, codes=(0, 2)),
    Row("eval", "apply_chat_template", "--apply-chat-template", error("no chat template"), TASKS, codes=(0, 2)),
    Row("eval", "system_instruction", "--system-instruction Think", report("system_instruction"), TASKS, after="Think"),
    Row("eval", "output_path", "--output-path {out}", written, TASKS, after=[""]),
    Row("eval", "batch_size", "--batch-size 1", seen("batches"), TASKS, after={1}),
    Row("eval", "batch_size", "--batch-size 1", report("batch_size"), TASKS, after=1),
    Row("eval", "compare", "--compare --plot {out}.svg", written, BOTH, after=[".svg"]),
    Row("eval", "plot", "--plot {out}-b.svg", written, f"{BOTH} --compare --plot {{out}}-a.svg", after=["-b.svg"]),
    Row(
        "eval",
        "overwrite",
        "--overwrite",
        users_files,
        f"{BOTH} --compare --plot {{taken}}/plot.svg",
        after=["page.html"],
        codes=(2, 0),
    ),
    Row("generate", "model", "model=other", report("text")),
    json_row("generate"),
    device_row("generate"),
    Row("generate", "dtype", "--dtype float32", report("weight_bytes")),
    *trust_rows("generate"),
    Row("generate", "seed", "--seed 1", report("text"), "--temperature 1"),
    Row("generate", "adapter", "--adapter adapter", report("text")),
    Row("generate", "prompt", "--prompt Owls", report("text")),
    Row("generate", "max_new_tokens", "--max-new-tokens 4", report("new_tokens"), after=4),
    Row("generate", "temperature", "--temperature 3", report("text")),
    Row("generate", "temperature", "--temperature 3", report("text"), "--temperature 1"),
    Row("generate", "pack", "--pack", report("packed"), "--no-pack", after=14),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_option_reaches_its_consumer(row: Row, request: pytest.FixtureRequest) -> None:
    check(row, request)
