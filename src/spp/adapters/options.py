"""Options of adapters: their shape, merging, converting."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from spp.options import DtypeName, Options, OutputOptions, SeedSettings


class AdapterSettings(Options):
    """The SPP adapter: W' = W + scale * W * (A[group] B)."""

    # `r` and `init_weights` are PEFT's words: SppConfig has these settings, defaults and descriptions, too.
    r: int | None = Field(
        None, ge=1, description="row groups R, at most a layer's output features (default: see lora-rank)"
    )
    lora_rank: int = Field(
        16, ge=1, description="without r: give each layer as many parameters as LoRA of this rank has"
    )
    directions: int = Field(
        4,
        ge=1,
        le=16,
        description="K rows of A for each row group, which every output row mixes by its K entries of B; "
        "1 is the published SPP",
    )
    scale: float = Field(2.0, gt=0, description="factor s of the update s * W * (A[group] B)")
    init_weights: Literal["ones", "published"] = Field(
        "ones",
        description="ones: A = 0, and each row of B has a single 1; published: A at random within 1/sqrt(I), and B = 0",
    )
    mode: Literal["fused", "split"] = Field(
        "fused",
        description="fused: three GEMMs a step, on the merged weight rounded once; split: four, and updates too small "
        "to change a bfloat16 weight still count",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter branch; above 0 costs one more GEMM")
    target_modules: str = Field(
        "all-linear",
        description="modules to adapt: all-linear, or names separated by commas (q_proj,v_proj)",
        json_schema_extra={"metavar": "NAMES"},
    )


class MergingSettings(Options):
    """Merging."""

    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest",
        description="how merged weights are rounded; stochastic keeps, in the mean, updates that the dtype is too "
        "coarse for; the seed fixes its bits",
    )


class MergeOptions(MergingSettings, SeedSettings, OutputOptions):
    """`spp merge MODEL ADAPTER OUT`: fold an adapter into its model and prove that the zeros stayed."""

    model: str = Field(
        description="the sparse model that the adapter was trained on: a folder or a hub id",
        json_schema_extra={"metavar": "MODEL"},
    )
    adapter: Path = Field(description="folder of the SPP adapter", json_schema_extra={"metavar": "DIR"})
    out: Path = Field(description="folder for the merged model", json_schema_extra={"metavar": "DIR"})
    dtype: DtypeName = Field("auto", description="dtype of the result; auto leaves every tensor its own")


class ConvertOptions(OutputOptions):
    """`spp convert ADAPTER OUT`: make an SPP adapter a HiRA adapter, which stock PEFT loads, or the other way round."""

    adapter: Path = Field(
        description="folder of an SPP adapter, a HiRA adapter, or one of the published SPP code",
        json_schema_extra={"metavar": "DIR"},
    )
    out: Path = Field(description="folder for the converted adapter", json_schema_extra={"metavar": "DIR"})
    to: Literal["spp", "hira"] | None = Field(
        None, description="what to write (default: hira from an SPP adapter, spp from any other)"
    )
    base: str | None = Field(
        None,
        description="the sparse model it belongs to, a folder or a hub id: shapes are checked, and the name noted",
        json_schema_extra={"metavar": "MODEL"},
    )
