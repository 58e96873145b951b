"""Scores of models, with or without adapters: perplexity or tasks, of one model or of several side by side."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

import spp.tuner  # noqa: F401 (makes PEFT know SPP adapters)
from spp.adapters.files import SETTINGS, read_settings
from spp.checkpoint import MANIFEST, resolve_model
from spp.errors import SppError, UsageError, raise_problems
from spp.fingerprint import base_fingerprint, warn_of_other_base
from spp.loading import brief, context_window, load_config, load_model, load_tokenizer
from spp.options import EvalOptions
from spp.packing import unpack_
from spp.stages.comparison import Comparison, check_plot, write_plot
from spp.stages.perplexity import perplexity_of, read_windows
from spp.stages.task_loading import TaskSet, load_tasks
from spp.stages.tasks import TasksReport, score_tasks

logger = logging.getLogger("spp")


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """The result of `evaluate`: a figure, and the protocol without which it means nothing.

    Attributes:
        perplexity: exp(nll).
        nll: mean over predicted tokens, in nats.
        unit: what perplexity is per: the model's tokens.
        tokens: predicted tokens.
        documents: records read, after `--limit`.
        windows: sequences scored.
        window: most tokens in one of them.
        stride: tokens from one window's start to the next one's; equal to `window`, as they never overlap.
        dtype: what the model computed in; log-probabilities are always fp32.
        source: the text.
    """

    perplexity: float
    nll: float
    unit: str
    tokens: int
    documents: int
    windows: int
    window: int
    stride: int
    per_document: bool
    dtype: str
    source: str
    seconds: float


def evaluate(options: EvalOptions) -> EvalReport | TasksReport | Comparison:
    """Measure a model's perplexity, or its scores on tasks where some are named; of several models, a comparison.

    An adapter's folder stands for the model that it was trained on, with the adapter on top.

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
        logger.warning("these perplexities do not compare: tokenizers or windows of the models differ")
    comparison = Comparison(reports, options.plot if options.compare else None)
    write_plot(comparison)
    return comparison


def _subjects(options: EvalOptions) -> dict[str, EvalOptions]:
    """What to score, by the name it was given: the options of one model each, checked for what can be checked."""
    subjects: dict[str, EvalOptions] = {}
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


def _subject(name: str, options: EvalOptions) -> EvalOptions:
    model, adapter = name, options.adapter
    if adapter is None and (Path(name) / SETTINGS).is_file():
        adapter = Path(name)
        model = read_settings(adapter).get("base_model_name_or_path")
        if not isinstance(model, str) or not model:
            raise UsageError(f"adapter {name} does not say which model it is for; pass the model, and --adapter {name}")
        try:
            resolve_model(model)
        except UsageError as error:
            raise UsageError(
                f"adapter {name} is for the model {model!r}: {error}; pass the model itself, and --adapter {name}"
            ) from None
    resolve_model(model)
    if adapter is not None:
        check_adapter(adapter, model)
    return options.model_copy(update={"model": model, "adapter": adapter, "others": ()})


def _perplexity(options: EvalOptions) -> EvalReport:
    """The perplexity of one model."""
    start = time.perf_counter()
    text = read_windows(options)
    model, dtype = _loaded(options)
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
        source=options.text,
        seconds=time.perf_counter() - start,
    )


def _scores(options: EvalOptions, tasks: TaskSet) -> TasksReport:
    """The scores of one model on tasks."""
    if options.window is not None:
        context_window(load_config(options.model, options), options.window)  # whether the model has so many positions
    tokenizer = load_tokenizer(options.model, options)
    model, dtype = _loaded(options)
    return score_tasks(model, tokenizer, tasks, options, dtype)


def _loaded(options: EvalOptions) -> tuple[PreTrainedModel | PeftModel, str]:
    """The model with its adapter, and the dtype that it computes in."""
    model = load_model(options.model, options)
    dtype = str(model.dtype).removeprefix("torch.")
    return (model if options.adapter is None else with_adapter(model, options.adapter)), dtype


def check_adapter(adapter: Path, model: str) -> None:
    """Refuse what is no adapter; warn where ours was trained on other weights than the model's."""
    if not (adapter / SETTINGS).is_file():
        raise UsageError(f"adapter {adapter}: no {SETTINGS} there; give the folder that spp train wrote")
    if (adapter / MANIFEST).is_file():
        warn_of_other_base(adapter, model, base_fingerprint(resolve_model(model)))


def with_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Put a saved adapter on a model.

    Raises:
        SppError: it is damaged, or was made for another model.
    """
    if read_settings(adapter).get("peft_type") != "SPP":
        unpack_(model, model.dtype)  # other methods know no packed layers, nor layers of another dtype than x
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            adapted = PeftModel.from_pretrained(model, str(adapter))
        # Again, because only this call tells what did not match: PEFT leaves factors that the file lacks at their
        # init, and drops those of modules that the model lacks.
        found = adapted.load_adapter(str(adapter), "default")
    except Exception as error:  # PEFT raises whatever its parts do: KeyError, RuntimeError, SafetensorError, ...
        raise SppError(f"adapter {adapter} does not load on this model: {brief(error)}") from error
    if odd := [*found.missing_keys, *found.unexpected_keys]:
        raise SppError(
            f"adapter {adapter} was made for another model: {len(odd)} of its tensors do not match, e.g. {odd[0]}"
        )
    return adapted
