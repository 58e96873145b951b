"""Options of evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from spp.options import (
    NOT_OF_THE_RESULT,
    DtypeName,
    LoadingOptions,
    Options,
    SeedSettings,
    TableSettings,
    WindowSettings,
    listed_names,
)


class ScoringSettings(TableSettings):
    """Scoring."""

    per_document: bool | None = Field(
        None,
        description="score each document by itself instead of windows over the joined text "
        "(default: for .jsonl, .json, .parquet and datasets ids)",
    )
    bos: Literal["auto", "always", "never"] = Field(
        "auto",
        description="the beginning-of-text token: always puts one before every window; auto does so for Gemma, which "
        "needs it, and else leaves it to the tokenizer, as published figures do",
    )
    limit: int | None = Field(None, ge=1, description="score only the first N documents, or N items of each task")
    stream: bool | None = Field(
        None,
        description="compute the perplexity block by block, with one block of a model in memory and hidden states on "
        "disk (default: where a model does not fit into memory)",
        json_schema_extra=NOT_OF_THE_RESULT,
    )


class TaskSettings(Options):
    """Tasks, scored by lm-eval."""

    tasks: str | None = Field(
        None,
        description="score tasks instead of a text: names that lm-eval knows, paper (the seven of the SPP paper), "
        "paper-harness (the same by the rules of the paper's harness), .jsonl files, folders of them, or .yaml files "
        "with lm-eval's definition of a task, separated by commas",
        json_schema_extra={"metavar": "NAMES"},
    )
    task_folder: Path | None = Field(
        None,
        description="take every task NAME from the file NAME.jsonl in this folder, and nothing from the hub",
        json_schema_extra={"metavar": "DIR"},
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="solved examples before each item (default: the task's own)"
    )
    apply_chat_template: bool = Field(
        False, description="put each prompt into the tokenizer's chat template, solved examples as its earlier turns"
    )
    system_instruction: str | None = Field(
        None, description="system prompt of the tasks", json_schema_extra={"metavar": "TEXT"}
    )
    output_path: Path | None = Field(
        None,
        description="also write the results as lm-eval's own JSON to this file",
        json_schema_extra={"metavar": "FILE"},
    )
    batch_size: int = Field(8, ge=1, description="answers scored at once")

    @property
    def task_names(self) -> list[str]:
        """What `tasks` lists."""
        return listed_names(self.tasks or "")


_OF_TASKS = ("task_folder", "num_fewshot", "apply_chat_template", "system_instruction", "output_path")


class EvalOptions(TaskSettings, ScoringSettings, WindowSettings, LoadingOptions):
    """`spp eval MODEL --text FILE`: perplexity or task scores of a model, or of several side by side."""

    model: str = Field(description="model: a folder or a hub id, plain or packed; or an adapter's folder")
    others: tuple[str, ...] = Field((), description="more models, to be shown side by side")
    adapter: Path | None = Field(
        None, description="folder of an adapter to attach to the model", json_schema_extra={"metavar": "DIR"}
    )
    text: str = Field(
        "python-stdlib",
        description="evaluation text: a file, a datasets id, or python-stdlib",
        json_schema_extra={"metavar": "DATA"},
    )
    stream_folder: Path = Field(
        Path(),
        description="folder in which --stream keeps hidden states until it has finished; a killed evaluation goes on "
        "from there (default: the current one)",
        json_schema_extra={"metavar": "DIR"},
    )
    compare: bool = Field(False, description="also plot the scores of several models")
    plot: Path = Field(
        Path("comparison.svg"), description="file for the plot of --compare", json_schema_extra={"metavar": "FILE"}
    )
    overwrite: bool = Field(False, description="replace the plot, or the file of output-path, if it exists")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        given = [name for name in ("text", "per_document", "bos", "columns") if name in self.model_fields_set]
        problems = []
        if self.tasks is not None and given:
            problems.append(
                f"{' and '.join(given).replace('_', '-')}: tasks bring their own text; leave one of them out"
            )
        of_tasks = [name for name in _OF_TASKS if name in self.model_fields_set]
        if self.tasks is None and of_tasks:
            names = " and ".join(of_tasks).replace("_", "-")
            problems.append(f"{names}: for tasks only; pass --tasks")
        if self.others and self.output_path is not None:
            problems.append("output-path goes with one model; score each by itself")
        if self.stream and (self.tasks is not None or self.adapter is not None):
            what = "tasks" if self.tasks is not None else "an adapter"
            problems.append(
                f"stream is for the perplexity of a model on disk, and not for {what}; leave one of them out"
            )
        if self.others and self.adapter is not None:
            problems.append("adapter goes with one model; give the adapter's folder as one of the models")
        if not self.others and (self.compare or "plot" in self.model_fields_set):
            problems.append("compare and plot need two models or more")
        elif "plot" in self.model_fields_set and not self.compare:
            problems.append("plot is where --compare draws; pass --compare too")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class GenerateOptions(SeedSettings, LoadingOptions):
    """`spp generate MODEL --prompt TEXT`: continue a text, and report speed and memory."""

    model: str = Field(description="a folder or a hub id, plain or packed")
    dtype: DtypeName = Field("auto", description="dtype to compute in; auto is the checkpoint's own")
    adapter: Path | None = Field(
        None, description="folder of an adapter to attach to the model", json_schema_extra={"metavar": "DIR"}
    )
    prompt: str = Field(min_length=1, description="text to continue", json_schema_extra={"metavar": "TEXT"})
    max_new_tokens: int = Field(64, ge=1, description="stop after N tokens")
    temperature: float = Field(0.0, ge=0, description="sampling temperature; 0 always takes the likeliest token")
    pack: bool | None = Field(None, description="keep sparse weights packed (default: where 30 % or more are zero)")
