"""The stages of a run, in order, with the options of each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from spp.adapters.merge import merge
from spp.adapters.options import MergeOptions
from spp.checkpoints.checkpoint import MANIFEST
from spp.checkpoints.json_files import read_object
from spp.checkpoints.options import VerifyOptions
from spp.checkpoints.verify import verify
from spp.errors import SppError, shown
from spp.evaluation.evaluate import evaluate
from spp.evaluation.options import EvalOptions
from spp.models.loading import context_of, load_config
from spp.options import Options
from spp.pipeline.options import RunOptions
from spp.pruning.options import PruneOptions
from spp.pruning.prune import prune
from spp.training.options import TrainOptions
from spp.training.train import train

ONE_SHOT, PRUNED, ADAPTER, MERGED = "one-shot", "pruned", "adapter", "merged"
TRAIN, MERGE = "train", "merge"
"""Names of the stages of which the last one that a run has writes the folder `MERGED`."""

StageOptions = TypeVar("StageOptions", bound=Options)


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: name of the stage and of its record.
        work: function that runs the stage and returns its report, a dataclass.
        out: the folder that it writes, if any.
    """

    name: str
    work: Callable[[], Any]
    out: Path | None = None


class Stages:
    """The stages of a run.

    Args:
        options: of the run.
        model: the dense model.
        folder: its folder.
        out: folder of the run.

    Attributes:
        pruned, adapter, merged: folders that stages write.
    """

    def __init__(self, options: RunOptions, model: str, folder: Path, out: Path) -> None:
        self._options, self._model, self._out = options, model, out
        windows = options.calibration_window, options.eval_window
        config = load_config(folder, options) if "context" in windows else None
        self._calibration_window, self._eval_window = (
            context_of(config) if window == "context" else window or options.window for window in windows
        )
        self.pruned, self.adapter, self.merged = out / PRUNED, out / ADAPTER, out / MERGED
        self._one_shot = out / ONE_SHOT

    @cached_property
    def training(self) -> TrainOptions:
        """Options of the fine-tuning."""
        # An adapter is rounded when it is merged; in full, the model itself is trained and written.
        own = {"out": self.merged} if self.in_full else {"out": self.adapter, "rounding": "nearest"}
        return self._of(TrainOptions, model=str(self.pruned), data=self._options.train, overwrite=True, **own)

    @property
    def in_full(self) -> bool:
        """Whether the weights themselves are trained, so that there is no adapter to merge."""
        return self._options.method == "full"

    def in_order(self) -> Iterator[Stage]:
        """The stages; each is created after the ones before it have finished."""
        yield Stage("evaluate_dense", lambda: self._evaluate(self._model))
        if self._options.reconstruct:
            yield Stage("evaluate_pruned", self._evaluate_one_shot)
        yield Stage("prune", lambda: self._prune(self.pruned), self.pruned)
        name = "evaluate_reconstructed" if self._options.reconstruct else "evaluate_pruned"
        yield Stage(name, lambda: self._evaluate(str(self.pruned)))
        yield Stage(TRAIN, lambda: train(self.training), self.training.out)
        if not self.in_full:
            yield Stage(MERGE, self._merge, self.merged)
        yield Stage("verify", self._verify)
        yield Stage("evaluate_spp", lambda: self._evaluate(str(self.merged)))

    def _of(self, kind: type[StageOptions], **values: Any) -> StageOptions:
        """A stage's options: the run's options that it shares, and `values`."""
        shared = {name: value for name, value in self._options if name in kind.model_fields}
        return kind.build({**shared, **values})

    # The folder of a stage without a record can only be what a killed run left behind, so a stage may replace it.

    def _prune(self, out: Path, **values: Any) -> Any:
        own = {"model": self._model, "out": out, "window": self._calibration_window, "overwrite": True}
        calibration = self._options.calibration or self._options.train
        return prune(self._of(PruneOptions, calibration=calibration, **own, **values))

    def _evaluate_one_shot(self) -> Any:
        """The perplexity from which the gap is counted: that of the mask alone, before blocks are reconstructed."""
        self._prune(self._one_shot, reconstruct=None)
        report = self._evaluate(str(self._one_shot))
        shutil.rmtree(self._one_shot, ignore_errors=True)
        return report

    def _merge(self) -> Any:
        # A run's dtype is what it computes in; what it writes keeps the model's own.
        values = {"model": str(self.pruned), "adapter": self.adapter, "out": self.merged}
        return merge(self._of(MergeOptions, **values, dtype="auto", overwrite=True))

    def _verify(self) -> Any:
        values = {"base": str(self.pruned), "other": str(self.merged), "pattern": self._pattern_of_every_matrix()}
        return verify(VerifyOptions.build(values))

    def _evaluate(self, model: str) -> Any:
        own = {"text": self._options.eval, "window": self._eval_window, "stream_folder": self._out}
        return evaluate(self._of(EvalOptions, model=model, **own))

    def _pattern_of_every_matrix(self) -> str | None:
        """The pattern to verify in every matrix; None if the sparsity is a mean over matrices (OWL, keep_zeros)."""
        pattern = read_object(self.pruned / MANIFEST).get("pattern")
        if not isinstance(pattern, str):
            raise SppError(f"{self.pruned / MANIFEST} was damaged: its pattern is {shown(pattern)}; pass --overwrite")
        is_mean = ":" not in pattern and (self._options.keep_zeros or self._options.allocation == "owl")
        return None if is_mean else pattern
