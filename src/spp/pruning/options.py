"""Options of pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self, cast, get_args

from pydantic import Field, model_validator

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
from spp.patterns import NM

BlockPart = Literal["block", "attention", "mlp"]
Criterion = Literal["magnitude", "magnitude-matrix", "wanda", "ria", "sparsegpt", "admm"]
Refinement = Literal["none", "dsnot", "swaps"]
Update = Literal["none", "sparsegpt", "admm", "least-squares"]


class PruningSettings(Options):
    """Pruning."""

    pattern: PatternOption = Field(
        NM(2, 4),
        description="what to keep: N:M keeps N of every M consecutive weights (2:4, 4:8, 2:8); 50% removes half",
        json_schema_extra={"metavar": "PATTERN"},
    )
    equal_rows: bool = Field(
        False,
        description="of a ratio, remove equally many weights of each row, rounding down, as published (else some rows "
        "lose one more, and the matrix has the ratio)",
    )
    criterion: Criterion = Field("wanda", description="how the weights to remove are chosen")
    allocation: Literal["uniform", "owl"] = Field(
        "uniform",
        description="sparsity of blocks: uniform, or less where there are more outliers (not for N:M)",
    )
    owl_limit: float = Field(0.08, gt=0, lt=0.5, description="owl: how far a block's sparsity may be from the mean")
    owl_threshold: float = Field(5.0, gt=1, description="owl: a Wanda score above X times the mean is an outlier")
    refine: Refinement = Field(
        "none", description="how removed and kept weights are exchanged after choosing, without training"
    )
    update: Update = Field(
        "none", description="how the weights that are kept get new values, so that the layer's outputs change least"
    )
    reconstruct: str | None = Field(
        None,
        description="after pruning, tune the weights that are left in each block towards its dense outputs: block (all "
        "at once), attention, mlp, or attention,mlp (one after the other)",
        json_schema_extra={"metavar": "PARTS"},
    )
    reconstruct_params: Literal["weights", "spp"] = Field(
        "weights",
        description="what reconstruction tunes: the weights that are left, or A and B of an SPP adapter",
    )
    reconstruct_r: int = Field(16, ge=1, description="reconstruction by spp: row groups of A")
    reconstruct_directions: int = Field(1, ge=1, le=16, description="reconstruction by spp: rows of A per row group")
    reconstruct_scale: float = Field(2.0, gt=0, description="reconstruction by spp: factor of the update")
    reconstruct_start: Literal["published", "ones"] = Field(
        "published", description="reconstruction by spp: how A and B start, as init-weights of an adapter"
    )
    reconstruct_epochs: int = Field(8, ge=1, description="passes of reconstruction over the calibration windows")
    reconstruct_learning_rate: float | None = Field(
        None,
        gt=0,
        description="peak learning rate of reconstruction (default: 0.1 for spp; 0.05 for weights, times their size)",
    )
    keep_zeros: bool = Field(
        False,
        description="prune nothing: keep the zeros that the model already has, and use neither pattern nor criterion",
    )
    calibration: str | None = Field(
        None,
        description="calibration text: a file or datasets id (default: spp run's training data, else python-stdlib)",
        json_schema_extra={"metavar": "DATA"} | NOT_OF_THE_RESULT,
    )
    samples: Samples = 128
    min_expert_tokens: int = Field(
        64, ge=0, description="prune an expert by magnitude where fewer than N calibration tokens reach it"
    )
    skip_indivisible: bool = Field(
        False, description="leave a layer dense, and name it, where M does not divide its input dimension"
    )

    @property
    def reconstructed_parts(self) -> tuple[BlockPart, ...]:
        """What reconstruction tunes, one after the other."""
        return cast(tuple[BlockPart, ...], tuple(self.reconstruct.split(","))) if self.reconstruct else ()

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if problems := _conflicts(self):
            raise ValueError("; ".join(problems))
        return self


def _conflicts(settings: PruningSettings) -> list[str]:
    """What in these settings excludes what."""
    problems = []
    if settings.allocation == "owl" and isinstance(settings.pattern, NM):
        problems.append(f"allocation owl varies the sparsity, and pattern {settings.pattern} fixes it; give 50% or so")
    if odd := [part for part in settings.reconstructed_parts if part not in get_args(BlockPart)]:
        problems.append(f"reconstruct takes block, attention, mlp, or attention,mlp, and not {odd[0]!r}")
    given = [
        name.replace("_", "-")
        for name in ("pattern", "equal_rows", "criterion", "allocation", "refine", "update", "reconstruct")
        if getattr(settings, name) != PruningSettings.model_fields[name].default
    ]
    if settings.keep_zeros and given:
        problems.append(f"keep-zeros prunes nothing, so leave out {', '.join(given)}")
    return problems


class PruneOptions(PruningSettings, TableSettings, WindowSettings, SeedSettings, LoadingOptions, OutputOptions):
    """`spp prune MODEL OUT`: remove weights from a dense model."""

    model: str = Field(description="dense model: a folder or a hub id", json_schema_extra=NOT_OF_THE_RESULT)
    out: Path = Field(description="folder for the pruned model", json_schema_extra=NOT_OF_THE_RESULT)
