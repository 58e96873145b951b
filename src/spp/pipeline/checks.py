"""Checks of every stage at the start of a run, so that no later stage fails after hours of work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from spp.data.records import stream_records
from spp.errors import Problems
from spp.models.loading import context_window, load_tokenizer, skeleton
from spp.pipeline.options import RunOptions
from spp.pruning.engine import matrices_to_prune
from spp.pruning.steps import steps_of
from spp.runtime.devices import compute_dtype, pick_device
from spp.training.checks import check_settings
from spp.training.new_adapter import target_layers
from spp.training.options import TrainOptions
from spp.training.teacher import check_teacher


def check_run(options: RunOptions, folder: Path, training: TrainOptions) -> None:
    """Refuse a run in which a stage is certain to fail; nothing is written.

    Args:
        options: options of the run.
        folder: folder of the dense model.
        training: options of the run's fine-tuning.

    Raises:
        UsageError: lists every problem.
        SppError: the model is damaged.
    """
    problems = Problems()
    device = problems.of(pick_device, options.device)
    problems.of(steps_of, options)
    problems.of(check_settings, training)
    for source in dict.fromkeys(filter(None, (options.train, options.eval, options.calibration))):
        problems.of(_check_data, source, options.column_names)
    problems.of(load_tokenizer, folder, options)
    model = device and problems.of(skeleton, folder, options, compute_dtype(options.dtype, device))
    if model is not None:
        _check_fit(options, training, model, problems)
    problems.raise_any()


def _check_fit(options: RunOptions, training: TrainOptions, model: PreTrainedModel, problems: Problems) -> None:
    """Check the options against the model."""
    for window in dict.fromkeys((options.window, options.calibration_window, options.eval_window)):
        if window != "context":
            problems.of(context_window, model.config, window)
    problems.of(matrices_to_prune, model, options)
    problems.of(target_layers, model, options.target_modules)
    problems.of(check_teacher, training, model.config.get_text_config().vocab_size)


def _check_data(source: str, columns: Mapping[str, str]) -> None:
    next(stream_records(source, columns))  # raises if there is no text, or none that can be read
