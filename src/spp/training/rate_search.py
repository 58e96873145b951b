"""Search for the learning rate: a few short runs from the same start, judged on held-out examples."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import nn

from spp.checkpoints.unfinished import read_record, write_record
from spp.errors import SppError
from spp.runtime import distributed
from spp.training.options import TrainOptions
from spp.training.progress_callback import LossNotFinite
from spp.training.sharding import set_trained, whole_trained
from spp.training.training_run import TrainingRun

logger = logging.getLogger("spp")

_FACTOR = 2.0
_MOST_TRIALS = 6
_SHARE, _FEWEST_STEPS, _MOST_STEPS = 0.1, 10, 50
_RECORD = "learning_rates.json"


def search(loss_after: Callable[[float], float], first: float) -> dict[float, float]:
    """Try rates from `first` on, twice or half as high, for as long as the loss falls.

    Args:
        loss_after: rate -> the loss after a trial with it; infinite where it diverges.
        first: the rate to begin with.

    Returns:
        Rate -> loss, of every trial. At most six are made.
    """
    tried = {first: loss_after(first)}
    for factor in (_FACTOR, 1 / _FACTOR):
        rate = first
        while len(tried) < _MOST_TRIALS:
            rate *= factor
            best = min(tried.values())
            tried[rate] = loss_after(rate)
            if not tried[rate] < best:
                break
        if min(tried.values()) < tried[first]:  # higher ones are better, so lower ones are not
            break
    return tried


def searched_rates(
    first: float,
    options: TrainOptions,
    model: nn.Module,
    examples: int,
    new_run: Callable[..., TrainingRun],
    work: Path,
) -> dict[float, float]:
    """Learning rate -> loss on held-out examples after a short run with it; `model` is as before in the end.

    A run that was killed after its search does not search again. All processes make the same trials.

    Args:
        first: rate to begin with.
        options: of the whole run.
        model: to train.
        examples: number of examples to train on.
        new_run: makes a run from options, a rate, `folder` and `trial`.
        work: the whole run's folder of checkpoints.

    Raises:
        SppError: the training diverges at every rate.
    """
    record, folder = work / _RECORD, work / "trial"
    if record.is_file():
        return {float(rate): loss for rate, loss in read_record(record).items()}
    before, short = whole_trained(model), _short(options, examples)

    def loss_after(rate: float) -> float:
        try:
            result = new_run(short, rate, folder=folder, trial=True).run()
        except LossNotFinite:
            return math.inf
        finally:
            set_trained(model, before)
            shutil.rmtree(folder, ignore_errors=True)
        loss = result.validation[-1][1]
        logger.info("learning rate %.2g: loss %.4f on held-out examples after %d steps", rate, loss, result.steps)
        return loss

    tried = {rate: loss for rate, loss in search(loss_after, first).items() if math.isfinite(loss)}
    if not tried:
        raise SppError(
            f"learning-rate auto: training diverges at all rates from {first:.2g} down; check the data and the model"
        )
    if distributed.rank() == 0:
        write_record(record, {str(rate): loss for rate, loss in tried.items()})
    return tried


def _short(options: TrainOptions, examples: int) -> TrainOptions:
    """The options of a trial: a tenth of the run's steps, from 10 to 50 of them, with a schedule of their own."""
    whole = options.max_steps or math.ceil(options.epochs * examples / options.batch_size)
    steps = min(whole, max(_FEWEST_STEPS, min(round(_SHARE * whole), _MOST_STEPS)))
    never = steps + 1
    changes = {"max_steps": steps, "save_steps": never, "eval_steps": never, "report_to": "none"}
    return options.model_copy(update=changes)
