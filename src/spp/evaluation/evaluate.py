"""`spp eval`: perplexity or task scores, with or without an adapter, of one model or of several side by side."""

from __future__ import annotations

import logging
import time

from peft import PeftModel
from transformers import PreTrainedModel

from spp.adapters.attach import with_adapter
from spp.checkpoints.atomic_folder import check_output_file
from spp.errors import UsageError
from spp.evaluation.comparison import Comparison, check_plot, write_plot
from spp.evaluation.options import EvalOptions
from spp.evaluation.perplexity import EvalReport, perplexity_of, read_windows
from spp.evaluation.streaming import do_not_fit, stream_perplexities
from spp.evaluation.subjects import Subject, subjects_of
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
    subjects = subjects_of(options)
    if options.compare:
        check_plot(options.plot, options.overwrite)
    if options.output_path is not None:
        check_output_file(options.output_path, options.overwrite)
    reports: dict[str, EvalReport | TasksReport] = {}
    if options.tasks is None and (do_not_fit(subjects) if options.stream is None else options.stream):
        reports |= stream_perplexities(subjects, options)
    else:
        tasks = load_tasks(options) if options.tasks is not None else None
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


def _perplexity(subject: Subject) -> EvalReport:
    """The perplexity of one model, which is loaded as a whole."""
    start = time.perf_counter()
    text = read_windows(subject.options, subject.folder)
    model, dtype = _loaded(subject)
    score = perplexity_of(model, text.windows)
    return EvalReport.of(score, text, subject.options.text, dtype, time.perf_counter() - start)


def _scores(subject: Subject, tasks: TaskSet) -> TasksReport:
    """The scores of one model on tasks."""
    options = subject.options
    if options.window is not None:
        context_window(load_config(subject.folder, options), options.window)  # raises if the model has fewer positions
    tokenizer = load_tokenizer(subject.folder, options)
    if options.apply_chat_template and not tokenizer.chat_template:
        raise UsageError(f"apply-chat-template: the tokenizer of {options.model} has no chat template; leave it out")
    model, dtype = _loaded(subject)
    return score_tasks(model, tokenizer, tasks, options, dtype)


def _loaded(subject: Subject) -> tuple[PreTrainedModel | PeftModel, str]:
    """The model with its adapter, and the dtype that it computes in."""
    model, adapter = load_model(subject.folder, subject.options), subject.options.adapter
    dtype = dtype_name(model.dtype)
    return (model if adapter is None else with_adapter(model, adapter)), dtype
