"""The learning rate of a run: the one that was asked for, one that suits the model's size, or the best of some."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from spp.training.options import TrainingSettings, TrainOptions
from spp.training.rate_search import searched_rates
from spp.training.training_run import TrainingRun

logger = logging.getLogger("spp")

_SPP, _FULL = 1.0, 0.05
_PUBLISHED = 4e-3


def scaled_rate(settings: TrainingSettings, config: PretrainedConfig) -> float:
    """A learning rate for a model of this size.

    A step of AdamW changes what is trained by about the learning rate, whatever the gradient is: with SPP, each weight
    by scale * rate of itself. Changes of weights agree where an output adds them up, over the hidden size d, and where
    the residual stream adds up the L blocks; weights themselves do not. So the same change of the model's output takes
    a rate that falls as 1 / sqrt(d L): 1 / (scale sqrt(d L)) for SPP, 0.05 / sqrt(d L) for the weights themselves.

    Args:
        settings: the method, the scale and the start of factors. The published start keeps the published rate, 0.004.
        config: the model's.
    """
    text = config.get_text_config()
    size = math.sqrt(text.hidden_size * text.num_hidden_layers)
    if settings.method == "full":
        return _FULL / size
    return _PUBLISHED if settings.init_weights == "published" else _SPP / (settings.scale * size)


def learning_rate(
    options: TrainOptions,
    model: PreTrainedModel | PeftModel,
    examples: int,
    new_run: Callable[..., TrainingRun],
    work: Path,
) -> tuple[float, dict[float, float]]:
    """The peak learning rate, and rate -> loss on held-out examples of what was tried to find it.

    Args:
        options: of the run.
        model: to train.
        examples: number of examples to train on.
        new_run: see `searched_rates`.
        work: the run's folder of checkpoints.

    Raises:
        SppError: the search finds no rate with which training does not diverge.
    """
    if isinstance(options.learning_rate, float):
        return options.learning_rate, {}
    rate, tried = scaled_rate(options, model.config), {}
    if options.learning_rate == "auto":
        tried = searched_rates(rate, options, model, examples, new_run, work)
        rate = min(tried, key=lambda one: tried[one])
    logger.info("learning rate %.2g%s", rate, "" if tried else ", for the width and the number of blocks of this model")
    return rate, tried
