"""Options of a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from spp.adapters.options import MergingSettings
from spp.evaluation.options import ScoringSettings
from spp.options import NOT_OF_THE_RESULT, LoadingOptions, OutputOptions, SeedSettings, WindowSettings
from spp.pipeline.efforts import Effort, with_effort
from spp.pruning.options import PruningSettings
from spp.training.options import TrainingSettings


class RunOptions(
    PruningSettings,
    TrainingSettings,
    MergingSettings,
    ScoringSettings,
    WindowSettings,
    SeedSettings,
    LoadingOptions,
    OutputOptions,
):
    """`spp run`: prune, fine-tune, merge, verify, evaluate, report."""

    model: str | None = Field(
        None,
        description="dense model: a folder or a hub id (default: the bundled one)",
        json_schema_extra={"metavar": "MODEL"} | NOT_OF_THE_RESULT,
    )
    effort: Effort = Field(
        "quick",
        description="values of options that are not given: quick has their defaults; standard adds a better mask, "
        "reconstruction of the blocks, and the dense model as teacher; best adds more of each",
        json_schema_extra=NOT_OF_THE_RESULT,  # a result depends on the values
    )
    train: str = Field(
        "python-stdlib",
        description="training data: a file, a datasets id, or python-stdlib",
        json_schema_extra={"metavar": "DATA"} | NOT_OF_THE_RESULT,
    )
    eval: str = Field(
        "python-stdlib",
        description="evaluation text: a file, a datasets id, or python-stdlib",
        json_schema_extra={"metavar": "DATA"} | NOT_OF_THE_RESULT,
    )
    out: Path | None = Field(
        None,
        description="output folder (default: runs/<date-time>)",
        json_schema_extra={"metavar": "DIR"} | NOT_OF_THE_RESULT,
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        return with_effort(values) if isinstance(values, dict) else values
