"""Options of adapters: their shape, merging, converting."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from spp.options import NOT_OF_THE_RESULT, DtypeName, Options, OutputOptions, SeedSettings


class AdapterSettings(Options):
    """The SPP adapter: W' = W + scale * W * (A[group] B)."""

    # `r` and `init_weights` are PEFT's names. SppConfig has the same settings, defaults and descriptions.
    r: int | None = Field(
        None, ge=1, description="row groups R, at most a layer's output features (default: see lora-rank)"
    )
    lora_rank: int = Field(
        16, ge=1, description="without r: give each layer at most as many parameters as LoRA of this rank has"
    )
    directions: int = Field(
        4,
        ge=1,
        le=16,
        description="K: rows of A per row group; each output row combines them with its K entries of B; "
        "1 is the published SPP",
    )
    scale: float = Field(2.0, gt=0, description="factor s of the update s * W * (A[group] B)")
    init_weights: Literal["ones", "published"] = Field(
        "ones",
        description="ones: A = 0, and each row of B has a single 1; published: A uniform within 1/sqrt(I), B = 0",
    )
    mode: Literal["fused", "split"] = Field(
        "fused",
        description="fused: three GEMMs a step, on the merged weight rounded once; split: four, and updates too small "
        "to change a bfloat16 weight still count",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter branch; above 0: five GEMMs a step")
    target_modules: str = Field(
        "all-linear",
        description="modules to adapt: all-linear, or names separated by commas (q_proj,v_proj)",
        json_schema_extra={"metavar": "NAMES"},
    )


class MergingSettings(Options):
    """Merging."""

    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest",
        description="how merged weights are rounded; stochastic keeps, on average, updates that are too small for the "
        "dtype; the seed determines its bits",
    )


class WritingOptions(MergingSettings, SeedSettings, OutputOptions):
    """Writing a sparse model with new values."""

    model: str = Field(
        description="the sparse model that the adapter was trained on: a folder or a hub id",
        json_schema_extra={"metavar": "MODEL"} | NOT_OF_THE_RESULT,
    )
    out: Path = Field(
        description="folder for the merged model", json_schema_extra={"metavar": "DIR"} | NOT_OF_THE_RESULT
    )
    dtype: DtypeName = Field("auto", description="dtype of the result; auto keeps each tensor's own")
    allow_nonfinite: bool = Field(False, description="accept NaN and infinity in MODEL")
    allow_dense: bool = Field(False, description="accept a MODEL without zeros, where there is nothing to prove")


class MergeOptions(WritingOptions):
    """`spp merge MODEL ADAPTER OUT`: merge an adapter into its model and prove that every zero stayed."""

    adapter: Path = Field(
        description="folder of the SPP adapter", json_schema_extra={"metavar": "DIR"} | NOT_OF_THE_RESULT
    )


class ConvertOptions(OutputOptions):
    """`spp convert ADAPTER OUT`: convert an SPP adapter to HiRA, which stock PEFT loads, or another adapter to SPP."""

    adapter: Path = Field(
        description="folder of an SPP adapter, a HiRA adapter, or one of the published SPP code",
        json_schema_extra={"metavar": "DIR"},
    )
    out: Path = Field(description="folder for the converted adapter", json_schema_extra={"metavar": "DIR"})
    to: Literal["spp", "hira"] | None = Field(
        None, description="layout to convert to (default: hira for an SPP adapter, spp for any other)"
    )
    base: str | None = Field(
        None,
        description="the adapter's sparse model, a folder or a hub id: shapes are checked, and its name is recorded",
        json_schema_extra={"metavar": "MODEL"},
    )
