"""`spp eval`: perplexity or task scores, with or without an adapter, of one model or of several side by side."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from spp.adapters.attach import check_adapter, with_adapter
from spp.adapters.factors import SETTINGS, read_settings
from spp.checkpoints.hub import resolve_model
from spp.errors import UsageError, raise_problems
from spp.evaluation.comparison import Comparison, check_plot, write_plot
from spp.evaluation.options import EvalOptions
from spp.evaluation.perplexity import EvalReport, perplexity_of, read_windows
from spp.evaluation.task_loading import TaskSet, load_tasks
from spp.evaluation.tasks import TasksReport, score_tasks
from spp.models.loading import context_window, load_config, load_model, load_tokenizer
from spp.ops.dtypes import dtype_name

logger = logging.getLogger("spp")


def evaluate(options: EvalOptions) -> EvalReport | TasksReport | Comparison:
    """Measure a model's perplexity, or its scores if `options` name tasks; compare the models if there are several.

    An adapter's folder, given as a model, means the model that it was trained on with the adapter attached.

    Raises:
        UsageError: a wrong option, a missing model, adapter, text or task, or too little text for one window.
        SppError: a damaged file, or a model whose output is not finite.
    """
    subjects = _subjects(options)
    if options.compare:
        check_plot(options.plot, options.overwrite)
    tasks = load_tasks(options) if options.tasks is not None else None
    reports: dict[str, EvalReport | TasksReport] = {}
    for name, subject in subjects.items():
        if len(subjects) > 1:
            logger.info("%s ...", name)
        reports[name] = _perplexity(subject) if tasks is None else _scores(subject, tasks)
    if len(reports) == 1:
        return reports[options.model]
    if len({(one.tokens, one.windows) for one in reports.values() if isinstance(one, EvalReport)}) > 1:
        logger.warning("these perplexities cannot be compared: the models have different tokenizers or windows")
    comparison = Comparison(reports, options.plot if options.compare else None)
    write_plot(comparison)
    return comparison


@dataclass(frozen=True)
class _Subject:
    """One model to score: the options for it alone, and its folder, looked up once."""

    options: EvalOptions
    folder: Path


def _subjects(options: EvalOptions) -> dict[str, _Subject]:
    """The models to score by the name that the user gave, checked as far as possible without loading them."""
    subjects: dict[str, _Subject] = {}
    problems: list[str] = []
    for name in (options.model, *options.others):
        if name in subjects:
            problems.append(f"model {name!r} is named twice")
        try:
            subjects[name] = _subject(name, options)
        except UsageError as error:
            problems.append(str(error))
    raise_problems(problems)
    return subjects


def _subject(name: str, options: EvalOptions) -> _Subject:
    model, adapter = name, options.adapter
    if adapter is None and (Path(name) / SETTINGS).is_file():
        adapter = Path(name)
        model = read_settings(adapter).get("base_model_name_or_path")
        if not isinstance(model, str) or not model:
            raise UsageError(f"adapter {name} does not say which model it is for; pass the model, and --adapter {name}")
        try:
            folder = resolve_model(model, code=options.trust_remote_code)
        except UsageError as error:
            raise UsageError(
                f"adapter {name} is for the model {model!r}: {error}; pass the model itself, and --adapter {name}"
            ) from None
    else:
        folder = resolve_model(model, code=options.trust_remote_code)
    if adapter is not None:
        check_adapter(adapter, model, folder)
    return _Subject(options.model_copy(update={"model": model, "adapter": adapter, "others": ()}), folder)


def _perplexity(subject: _Subject) -> EvalReport:
    """The perplexity of one model."""
    start = time.perf_counter()
    text = read_windows(subject.options, subject.folder)
    model, dtype = _loaded(subject)
    score = perplexity_of(model, text.windows)
    return EvalReport(
        perplexity=score.perplexity,
        nll=score.nll,
        unit="token",
        tokens=score.tokens,
        documents=text.documents,
        windows=len(text.windows),
        window=text.window,
        stride=text.window,
        per_document=text.per_document,
        dtype=dtype,
        source=subject.options.text,
        bos=text.bos,
        seconds=time.perf_counter() - start,
    )


def _scores(subject: _Subject, tasks: TaskSet) -> TasksReport:
    """The scores of one model on tasks."""
    options = subject.options
    if options.window is not None:
        context_window(load_config(subject.folder, options), options.window)  # raises if the model has fewer positions
    tokenizer = load_tokenizer(subject.folder, options)
    model, dtype = _loaded(subject)
    return score_tasks(model, tokenizer, tasks, options, dtype)


def _loaded(subject: _Subject) -> tuple[PreTrainedModel | PeftModel, str]:
    """The model with its adapter, and the dtype that it computes in."""
    model, adapter = load_model(subject.folder, subject.options), subject.options.adapter
    dtype = dtype_name(model.dtype)
    return (model if adapter is None else with_adapter(model, adapter)), dtype
