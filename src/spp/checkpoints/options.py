"""Options of commands on files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from spp.options import (
    NOT_OF_THE_RESULT,
    LoadingOptions,
    Options,
    OutputOptions,
    PatternOption,
    Samples,
    SeedSettings,
    TableSettings,
    WindowSettings,
)


class VerifyOptions(Options):
    """`spp verify BASE OTHER`: prove that every zero of BASE is an exact +0.0 in OTHER."""

    base: str = Field(description="the pruned model: a folder or a hub id; with --record, the merged model")
    other: str | None = Field(None, description="the model to check: a folder or a hub id")
    pattern: PatternOption | None = Field(
        None,
        description="also check that the pruned matrices of OTHER obey this pattern, each expert by itself",
        json_schema_extra={"metavar": "PATTERN"},
    )
    targets: str | None = Field(
        None,
        description="with --pattern: the tensors that have to obey it, as names or last parts of names separated by "
        "commas (default: those that the manifest lists, else all with 1 % zeros or more)",
        json_schema_extra={"metavar": "NAMES"},
    )
    record: Path | None = Field(
        None,
        description="check the one model given against the record that spp merge wrote (verification.json), without "
        "the pruned model",
        json_schema_extra={"metavar": "FILE"},
    )
    allow_nonfinite: bool = Field(False, description="accept NaN and infinity in BASE")
    allow_dense: bool = Field(False, description="accept a BASE without a single zero")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        problems = []
        if (self.other is None) == (self.record is None):
            problems.append("give two models, or one model and --record")
        elif self.record is not None and (self.pattern or self.targets or self.allow_nonfinite or self.allow_dense):
            problems.append("record compares with what was proved; leave out the other options")
        if self.targets is not None and self.pattern is None:
            problems.append("targets says what has to obey a pattern; pass --pattern")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _number(value: object) -> object:
    """The number that a text on the command line is."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


class PackOptions(TableSettings, WindowSettings, SeedSettings, LoadingOptions, OutputOptions):
    """`spp pack MODEL OUT`: write a sparse model as a packed archive, without its zeros."""

    model: str = Field(description="sparse model: a folder or a hub id", json_schema_extra=NOT_OF_THE_RESULT)
    out: Path = Field(description="folder for the archive", json_schema_extra=NOT_OF_THE_RESULT)
    bits: Annotated[Literal[8, 6, 5, 4, 3, 2] | None, BeforeValidator(_number)] = Field(
        None,
        description="store each survivor in that many bits (default: as it is, bit for bit)",
        json_schema_extra={"metavar": "8|6|5|4|3|2"},
    )
    group: Annotated[Literal[64, 128], BeforeValidator(_number)] = Field(
        128,
        description="with --bits: columns that share a scale in each row",
        json_schema_extra={"metavar": "64|128"},
    )
    calibration: str | None = Field(
        None,
        description="with --bits: text on which the layers' outputs are to change least, a file or datasets id; it "
        "takes longer, and the result is better (default: none; each survivor takes the nearest value)",
        json_schema_extra={"metavar": "DATA"} | NOT_OF_THE_RESULT,
    )
    samples: Samples = 128

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        problems = []
        if self.bits is None and self.calibration is not None:
            problems.append("calibration chooses the values of few bits; pass --bits, or leave it out")
        if self.bits is None and self.group != type(self).model_fields["group"].default:
            problems.append("group is about the scales of few bits; pass --bits, or leave it out")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class UnpackOptions(OutputOptions):
    """`spp unpack ARCHIVE OUT`: write a packed archive as plain safetensors, which load anywhere."""

    model: str = Field(description="packed archive: a folder or a hub id")
    out: Path = Field(description="folder for the model")


class InspectOptions(Options):
    """`spp inspect MODEL`: sparsity and detected pattern of every weight matrix."""

    model: str = Field(description="a folder or a hub id")


class PushOptions(Options):
    """`spp push MODEL REPO`: upload a model to the hub, with a model card that has the proof."""

    model: Path = Field(description="folder of a model that spp wrote: merged, pruned or packed")
    repo: str = Field(description="where to on the hub: USER/NAME; made if it is not there")
    private: bool = Field(False, description="make the repository private where it is new")
