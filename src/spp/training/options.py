"""Options of training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from spp.adapters.options import AdapterSettings, MergingSettings
from spp.options import (
    NOT_OF_THE_RESULT,
    LoadingOptions,
    Options,
    OutputOptions,
    SeedSettings,
    TableSettings,
    WindowSettings,
)


class ExampleSettings(TableSettings):
    """Training examples."""

    join_documents: bool | None = Field(
        None,
        description="join documents and cut them into full windows "
        "(default: where documents are longer than a window on average)",
    )
    max_tokens: int | None = Field(
        None, ge=2, description="read only the first N tokens of the data, as a stream (default: all of it)"
    )
    completion_only: bool = Field(
        False, description="loss on answers alone: completions, Alpaca's output, the assistant's messages"
    )


class TeacherSettings(Options):
    """Distillation from the dense model."""

    teacher: str | None = Field(
        None,
        description="dense model to learn from: a folder, a hub id, or the folder that spp cache-teacher wrote",
        json_schema_extra={"metavar": "MODEL"} | NOT_OF_THE_RESULT,
    )
    teacher_weight: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the divergence from the teacher in the loss; the rest is the loss on the data",
    )
    teacher_temperature: float | None = Field(
        None, gt=0, description="temperature of both distributions (default: 1, or that of the cache)"
    )
    teacher_features: float = Field(
        0.0, ge=0, description="weight of the relative squared error of every block's output; 0 leaves it out"
    )

    @model_validator(mode="after")
    def _check_teacher(self) -> Self:
        given = [name for name, field in TeacherSettings.model_fields.items() if getattr(self, name) != field.default]
        if self.teacher is None and given:
            names = ", ".join(name.replace("_", "-") for name in given)
            raise ValueError(f"{names}: there is no teacher to learn from; pass --teacher")
        return self


_HELD_OUT_TO_SEARCH = 32


class TrainingSettings(AdapterSettings, ExampleSettings, TeacherSettings):
    """Training.

    `recipes/paper.yaml` has the published values.
    """

    method: Literal["spp", "full"] = Field(
        "spp",
        description="what is trained: an SPP adapter, or all weights that are not zero (full), kept packed",
    )
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        None,
        description="peak learning rate of AdamW, or auto: the best of a few short trials, by their loss on held-out "
        "examples (default: by the model's width, its number of blocks, and the method)",
        json_schema_extra={"metavar": "X|auto"},
    )
    optimizer: Literal["adamw", "adamw-8bit"] = Field(
        "adamw", description="AdamW with its moments in float32, or in 8 bits (bitsandbytes): a quarter of their memory"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay on what is trained")
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="share of the steps over which the rate rises")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="how the rate falls after warm-up")
    epochs: float = Field(1.0, gt=0, description="passes over the training data")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps, whatever the epochs")
    batch_size: int = Field(8, ge=1, description="sequences per optimizer step, over all processes")
    device_batch_size: int | None = Field(
        None, ge=1, description="sequences computed at once on a device (default: batch-size, at most 8)"
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="recompute activations in backward: less memory, slower (default: where training would not fit "
        "without)",
    )
    pack: bool | None = Field(
        None,
        description="keep the base weights packed, without their zeros (default: where 30 % or more are zero)",
    )
    quantize: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="keep the base in 4 or 8 bits while training (bitsandbytes); merge into the model as it was before",
    )
    save_steps: int = Field(
        100,
        ge=1,
        description="optimizer steps between checkpoints to resume from",
        json_schema_extra=NOT_OF_THE_RESULT,
    )
    keep: int = Field(
        2,
        ge=1,
        description="checkpoints to keep during training; the best weights are kept in addition",
        json_schema_extra=NOT_OF_THE_RESULT,
    )
    validation: int = Field(
        0,
        ge=0,
        description="hold out N examples, and take the weights that have the lowest loss on them "
        f"(with learning-rate auto, 0 means {_HELD_OUT_TO_SEARCH})",
    )
    eval_steps: int | None = Field(
        None, ge=1, description="optimizer steps between evaluations on the held-out examples (default: save-steps)"
    )
    sharding: Literal["none", "fsdp", "zero3"] = Field(
        "none",
        description="what several processes do with the model: none gives each all of it (DDP), fsdp and zero3 "
        "(DeepSpeed) a share",
    )
    report_to: str = Field(
        "none",
        description="also log to tensorboard, wandb, trackio, ... (names separated by commas)",
        json_schema_extra={"metavar": "NAMES"} | NOT_OF_THE_RESULT,
    )

    @property
    def held_out(self) -> int:
        """Examples to hold out."""
        return self.validation or (_HELD_OUT_TO_SEARCH if self.learning_rate == "auto" else 0)

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        adapter = {name: AdapterSettings.model_fields[name].default for name in AdapterSettings.model_fields}
        only_spp = {name: default for name, default in adapter.items() if name != "target_modules"}
        only_spp |= {"quantize": "none"}
        names = [name for name, default in only_spp.items() if getattr(self, name) != default]
        names += ["no-pack"] if self.pack is False else []
        names += ["sharding zero3"] if self.sharding == "zero3" else []
        if self.method == "full" and names:
            raise ValueError(
                f"method full trains the packed weights themselves, without an adapter, so that it has no use for "
                f"{', '.join(name.replace('_', '-') for name in names)}; leave that out"
            )
        return self

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        if self.learning_rate == "auto" and self.sharding != "none":
            raise ValueError(
                f"learning-rate auto trains the model several times from its start, which a model that is sharded "
                f"({self.sharding}) does not go back to; give a number, or leave out sharding"
            )
        return self

    @model_validator(mode="after")
    def _check_optimizer(self) -> Self:
        if self.optimizer == "adamw-8bit" and self.sharding != "none":
            raise ValueError(f"optimizer adamw-8bit does not go with sharding {self.sharding}; leave one of them out")
        return self

    @model_validator(mode="after")
    def _check_base(self) -> Self:
        excluded = {"pack": self.pack is True, f"sharding {self.sharding}": self.sharding != "none"}
        if self.quantize != "none" and (names := [name for name, given in excluded.items() if given]):
            raise ValueError(f"quantize {self.quantize} does not go with {' or '.join(names)}; leave one of them out")
        return self


class TrainOptions(TrainingSettings, MergingSettings, WindowSettings, SeedSettings, LoadingOptions, OutputOptions):
    """`spp train MODEL OUT --data FILE`: fine-tune a sparse model with SPP."""

    model: str = Field(
        description="sparse model, pruned with any tool: a folder or a hub id", json_schema_extra=NOT_OF_THE_RESULT
    )
    out: Path = Field(
        description="folder for the adapter, or for the model with full", json_schema_extra=NOT_OF_THE_RESULT
    )
    data: str = Field(
        "python-stdlib",
        description="training data: a file, a datasets id, or python-stdlib",
        json_schema_extra={"metavar": "DATA"} | NOT_OF_THE_RESULT,
    )

    @model_validator(mode="after")
    def _check_rounding(self) -> Self:
        if self.method != "full" and self.rounding != "nearest":
            raise ValueError(
                f"rounding {self.rounding}: an adapter is not rounded; give it to spp merge, or pass --method full"
            )
        return self


class CacheTeacherOptions(ExampleSettings, WindowSettings, LoadingOptions, OutputOptions):
    """`spp cache-teacher MODEL OUT --data FILE`: store a dense model's predictions for `spp train --teacher`."""

    model: str = Field(description="dense model: a folder or a hub id")
    out: Path = Field(description="folder for its predictions, to be given to spp train as --teacher")
    data: str = Field(
        "python-stdlib",
        description="training data: a file, a datasets id, or python-stdlib",
        json_schema_extra={"metavar": "DATA"},
    )
    top_k: int = Field(64, ge=1, description="keep the N likeliest tokens of each distribution")
    temperature: float = Field(1.0, gt=0, description="temperature of the distributions")
