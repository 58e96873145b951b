"""Options of commands on files."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from spp.options import Options, OutputOptions, PatternOption


class VerifyOptions(Options):
    """`spp verify BASE OTHER`: prove that every zero of BASE is an exact +0.0 in OTHER."""

    base: str = Field(description="the model whose zeros count: a folder or a hub id")
    other: str = Field(description="the model to check: a folder or a hub id")
    pattern: PatternOption | None = Field(
        None,
        description="also check that the sparse weights of OTHER obey this pattern",
        json_schema_extra={"metavar": "PATTERN"},
    )


class PackOptions(OutputOptions):
    """`spp pack MODEL OUT`: write a sparse model as a packed archive, without its zeros."""

    model: str = Field(description="sparse model: a folder or a hub id")
    out: Path = Field(description="folder for the archive")


class UnpackOptions(OutputOptions):
    """`spp unpack ARCHIVE OUT`: write a packed archive as plain safetensors, which load anywhere."""

    model: str = Field(description="packed archive: a folder or a hub id")
    out: Path = Field(description="folder for the model")


class InspectOptions(Options):
    """`spp inspect MODEL`: sparsity and detected pattern of every weight matrix."""

    model: str = Field(description="a folder or a hub id")


class PushOptions(Options):
    """`spp push MODEL REPO`: upload a model to the hub, with a card that says what was proved."""

    model: Path = Field(description="folder of a model that spp wrote: merged, pruned or packed")
    repo: str = Field(description="where to on the hub: USER/NAME; made if it is not there")
    private: bool = Field(False, description="make the repository private where it is new")
