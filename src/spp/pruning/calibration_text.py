"""The text of a calibration, as windows of tokens, and what is recorded of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from spp.checkpoints.options import PackOptions
from spp.data.calibration import Calibration, calibration_windows
from spp.models.loading import context_window, load_tokenizer
from spp.pruning.options import PruneOptions

logger = logging.getLogger("spp")


@dataclass(frozen=True)
class CalibrationFacts:
    """The calibration text; `kind` says how the windows were drawn, `sha256` is the hash of the token ids."""

    source: str
    samples: int
    window: int
    seed: int
    sha256: str
    kind: str


def read_calibration(
    options: PruneOptions | PackOptions, text: str, folder: Path, model: PreTrainedModel
) -> tuple[Tensor, CalibrationFacts]:
    """Draw windows of a text.

    Args:
        options: number, size and seed of the windows.
        text: a file or datasets id.
        folder: of the model, which has the tokenizer.
        model: for its context.

    Returns:
        (samples, window) int64 token ids, and their facts.
    """
    window = context_window(model.config, options.window)
    calibration: Calibration = calibration_windows(
        load_tokenizer(folder, options),
        text,
        samples=options.samples,
        window=window,
        seed=options.seed,
        columns=options.column_names,
    )
    samples, window = calibration.windows.shape
    facts = CalibrationFacts(calibration.source, samples, window, options.seed, calibration.sha256, calibration.kind)
    logger.info(
        "calibrating on %d windows of %d tokens from %s (%s, seed %d)",
        samples, window, facts.source, facts.kind, facts.seed,
    )  # fmt: skip
    return calibration.windows, facts
