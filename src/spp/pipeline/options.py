"""Options of a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from spp.adapters.options import MergingSettings
from spp.errors import shown
from spp.evaluation.options import ScoringSettings
from spp.options import NOT_OF_THE_RESULT, LoadingOptions, OutputOptions, SeedSettings, WindowSettings
from spp.pipeline.efforts import Effort, with_effort
from spp.pruning.options import PruningSettings
from spp.training.options import TrainingSettings


def _as_window(value: Any) -> Any:
    text = str(value)
    if value is None or text == "context" or (text.isascii() and text.isdigit() and int(text) >= 2):
        return value
    raise ValueError(f"a window is a number of tokens, 2 or more, or context, but it is {shown(value)}")


StageWindow = Annotated[int | Literal["context"] | None, BeforeValidator(_as_window)]
"""Tokens per window in a stage; `context` is the number of the model's positions, None the run's window."""


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
    calibration_window: StageWindow = Field(
        None,
        description="tokens per calibration window; context: the model's positions (default: window)",
        json_schema_extra={"metavar": "N|context"},
    )
    eval_window: StageWindow = Field(
        None,
        description="tokens per window of evaluation; context: the model's positions (default: window)",
        json_schema_extra={"metavar": "N|context"},
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
