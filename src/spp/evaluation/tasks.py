"""Score tasks with lm-eval: prompts, log-likelihoods, metrics and standard errors are all its own."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spp._version import __version__
from spp.errors import SppError, brief
from spp.evaluation.lm_eval_json import write_lm_eval_json
from spp.evaluation.options import EvalOptions
from spp.evaluation.task_loading import HARNESS, PAPER, TaskSet, groups_in, quiet, tasks_in

logger = logging.getLogger("spp")

_EXAMPLES_SEED = 1234  # lm-eval's default
_HARNESS_ITEMS = 2000
_FORMS = {
    PAPER: "paper: today's lm-eval, with its own versions of the tasks, BOS as the tokenizer adds it, all items",
    HARNESS: "paper-harness: as the paper's harness, no BOS in front, 2,000 items a task if the model's name has 65b "
    "or 70b, the figure is acc; but the prompts are those of today's versions of the tasks",
}
_VERSIONS = ("lm_eval", "transformers", "torch", "datasets")


@dataclass(frozen=True)
class Metric:
    """A mean over items, and its standard error if lm-eval gives one."""

    value: float
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The scores of one task or one group of tasks.

    Attributes:
        metrics: by lm-eval's names; acc is the share of items whose right answer has the highest log-likelihood,
            acc_norm the same with each log-likelihood divided by the answer's characters.
        items: number of scored items.
        num_fewshot: number of solved examples before each item.
        version: lm-eval's version of the task.
        source: the file or the data set.
        sha256: hash of the file.
        part_of: the requested group that contains this task.
    """

    metrics: dict[str, Metric]
    items: int
    num_fewshot: int
    version: str
    source: str | None
    sha256: str | None
    part_of: str | None


@dataclass(frozen=True, kw_only=True)
class MeanScore:
    """The unweighted mean of several tasks' acc.

    Attributes:
        value: the mean.
        stderr: its standard error for independent tasks: sqrt(sum of squared standard errors) / number of tasks.
        tasks: the tasks in the mean.
        missing: requested tasks of the paper's seven that have no file.
    """

    value: float
    stderr: float | None
    tasks: list[str]
    missing: list[str]


@dataclass(frozen=True, kw_only=True)
class TasksReport:
    """The result of `spp eval --tasks`: the scores, and the protocol by which they were measured.

    Attributes:
        tasks: task or group -> its scores.
        mean: over the requested tasks that have acc; None if there are fewer than two.
        context: most tokens of prompt and answer; a longer prompt is cut at its beginning.
        shortened: number of answers whose prompt was cut.
        limit: items scored of each task; None if all were.
        form: what `paper` or `paper-harness` means; None for other tasks.
        chat_template: whether each prompt was put into the tokenizer's chat template.
        system_instruction: the system prompt.
        dtype: dtype that the model computed in, log-probabilities included.
        versions: versions of the packages that the scores depend on.
    """

    model: str
    adapter: str | None
    tasks: dict[str, TaskScore]
    mean: MeanScore | None
    context: int
    shortened: int
    limit: int | None
    form: str | None
    chat_template: bool
    system_instruction: str | None
    batch_size: int
    dtype: str
    device: str
    versions: dict[str, str]
    seconds: float


def score_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: TaskSet,
    options: EvalOptions,
    dtype: str,
) -> TasksReport:
    """Score one model.

    Args:
        model: a causal LM, packed or not, with an adapter or not.
        tokenizer: the model's.
        tasks: the tasks to score it on.
        options: names of model and adapter, window, limit, few-shot examples, batch size.
        dtype: the model's dtype, for the report.

    Raises:
        UsageError: a token id is beyond the model's vocabulary.
        SppError: a log-likelihood is not a number, an answer is longer than the context, or lm-eval fails.
    """
    with quiet():
        from spp.evaluation.lm_eval_model import ScoredModel

        start = time.perf_counter()
        by_harness = tasks.form == HARNESS
        scored = ScoredModel(
            model, tokenizer, batch_size=options.batch_size, window=options.window, bos=False if by_harness else None
        )
        limit = options.limit or (_harness_limit(options.model) if by_harness else None)
        results = _run_lm_eval(scored, tasks, options, limit)
    if options.output_path is not None:
        write_lm_eval_json(options.output_path, results, scored, options, limit)
    if scored.shortened:
        logger.warning(
            "%d prompts were longer than the model's context of %d tokens, and lost their beginning",
            scored.shortened, scored.max_length,
        )  # fmt: skip
    scores = _task_scores(results, tasks)
    return TasksReport(
        model=options.model,
        adapter=None if options.adapter is None else str(options.adapter),
        tasks=scores,
        mean=_mean(scores, tasks.missing),
        context=scored.max_length,
        shortened=scored.shortened,
        limit=limit,
        form=_FORMS[tasks.form] if tasks.form else None,
        chat_template=options.apply_chat_template,
        system_instruction=options.system_instruction,
        batch_size=options.batch_size,
        dtype=dtype,
        device=str(model.device),
        versions={"spp": __version__, **{name: version(name) for name in _VERSIONS}},
        seconds=time.perf_counter() - start,
    )


def _harness_limit(model: str) -> int | None:
    """The paper's harness scores the first 2,000 items of each task where a model's name has its size of 65 or 70 B."""
    return _HARNESS_ITEMS if any(size in model.lower() for size in ("65b", "70b")) else None


def _run_lm_eval(scored: Any, tasks: TaskSet, options: EvalOptions, limit: int | None) -> dict[str, Any]:
    """lm-eval's results for a `ScoredModel`.

    Raises:
        SppError: lm-eval or a task fails.
    """
    loaded: Any = import_module("lm_eval.tasks").TaskManager(include_defaults=False).load(list(tasks.loaded))
    for task in loaded["tasks"].values():
        _set_examples(task, options.num_fewshot)
    # Not `simple_evaluate`, which also runs git, pip and others to describe the machine.
    run: Any = import_module("lm_eval.evaluator").evaluate
    _set_seeds()
    try:
        return run(
            scored,
            loaded,
            limit=limit,
            log_samples=False,
            system_instruction=options.system_instruction,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.apply_chat_template,
        )
    except SppError:
        raise
    except Exception as error:  # lm-eval and its tasks may raise anything
        raise SppError(f"lm-eval failed: {brief(error)}") from error


def _set_seeds() -> None:
    """Those of `lm_eval.simple_evaluate`, for tasks that sample."""
    random.seed(0)
    numpy.random.seed(_EXAMPLES_SEED)
    torch.manual_seed(_EXAMPLES_SEED)


def _set_examples(task: Any, asked: int | None) -> None:
    """Set the number of few-shot examples as `lm_eval.simple_evaluate` does: a task fixed to 0 stays at 0."""
    fixed = task.get_config("num_fewshot")
    if asked is not None and fixed != 0:
        task.set_config(key="num_fewshot", value=asked)
    elif fixed is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_EXAMPLES_SEED)


def _task_scores(results: Mapping[str, Any], tasks: TaskSet) -> dict[str, TaskScore]:
    """lm-eval's results as `TaskScore`, in its order."""
    outer = {
        part: group.name
        for group in tasks.loaded
        if hasattr(group, "get_all_tasks")
        for part in (*tasks_in(group), *groups_in(group))
    }
    scores = {}
    for name, found in results["results"].items():
        file, config = tasks.files.get(name), results["configs"].get(name, {})
        dataset = [config[key] for key in ("dataset_path", "dataset_name") if config.get(key)]
        if metrics := _metrics(found):
            scores[name] = TaskScore(
                metrics=metrics,
                items=found["sample_len"],
                num_fewshot=results["n-shot"].get(name, 0),
                version=str(results["versions"].get(name, "")),
                source=str(file.path) if file else ":".join(dataset) or None,
                sha256=file.sha256 if file else None,
                part_of=outer.get(name),
            )
    return scores


def _metrics(found: Mapping[str, Any]) -> dict[str, Metric]:
    """`{"acc,none": 0.5, "acc_stderr,none": 0.1}` -> `{"acc": Metric(0.5, 0.1)}`; another filter is put in the name."""
    metrics = {}
    for key, value in found.items():
        name, _, chosen = key.partition(",")
        if chosen and not name.endswith("_stderr"):
            stderr = found.get(f"{name}_stderr,{chosen}")
            known = isinstance(stderr, float) and math.isfinite(stderr)
            metrics[name if chosen == "none" else f"{name} ({chosen})"] = Metric(value, stderr if known else None)
    return metrics


def _mean(scores: Mapping[str, TaskScore], missing: list[str]) -> MeanScore | None:
    found = {
        name: score.metrics["acc"] for name, score in scores.items() if "acc" in score.metrics and not score.part_of
    }
    if len(found) < 2:
        return None
    errors = [metric.stderr for metric in found.values() if metric.stderr is not None]
    known = len(errors) == len(found)
    return MeanScore(
        value=sum(metric.value for metric in found.values()) / len(found),
        stderr=math.hypot(*errors) / len(found) if known else None,
        tasks=list(found),
        missing=missing,
    )
