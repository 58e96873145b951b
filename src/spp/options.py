"""Every option, defined once: the command line, recipe files and the Python API all read these models.

The module imports neither torch nor transformers, so that `spp --help` is instant. Options are frozen; pydantic
checks all of them at once, and `build` turns what it finds into one `UsageError` that lists every problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from spp.errors import UsageError, raise_problems
from spp.patterns import parse_pattern


def _checked_pattern(text: str) -> str:
    try:
        return str(parse_pattern(text))
    except UsageError as error:
        raise ValueError(str(error)) from None


PatternText = Annotated[str, AfterValidator(_checked_pattern)]
BlockPart = Literal["block", "attention", "mlp"]
Criterion = Literal["magnitude", "magnitude-matrix", "wanda", "ria", "sparsegpt"]


class Options(BaseModel):
    """Base of all option sets: frozen, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> Self:
        """Make the options from plain values.

        Raises:
            UsageError: names every unknown option and every bad value, with the value seen.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            problems = [_describe(problem) for problem in error.errors()]
            raise_problems(problems)
            raise AssertionError("a validation error without a problem") from error


def _describe(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{name}: no such option"
    if problem["type"] == "missing":
        return f"{name}: is required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # our own words, which show the value already
        # Of a check over several options, the name is empty.
        return message if message.startswith(name) else f"{name}: {message}"
    return f"{name}: {message[0].lower()}{message[1:]}, but it is {problem['input']!r}"


class LoadingOptions(Options):
    """How models are loaded."""

    device: str = Field("auto", description="where to compute: auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="dtype to compute in; auto is the checkpoint's own on an accelerator and float32 on a CPU, "
        "where it is faster and holds bfloat16 weights exactly",
    )
    trust_remote_code: bool = Field(False, description="run Python code that the model's repository brings along")


class OutputOptions(Options):
    """What happens to an output folder that exists."""

    overwrite: bool = Field(False, description="replace the output folder if it is not empty")


class PruningSettings(Options):
    """What to remove and by which criterion."""

    pattern: PatternText = Field(
        "2:4", description="what to keep: N:M keeps N of every M consecutive weights (2:4, 4:8, 2:8); 50% removes half"
    )
    criterion: Criterion = Field("wanda", description="how weights are chosen")
    allocation: Literal["uniform", "owl"] = Field(
        "uniform",
        description="sparsity of blocks: uniform, or less where there are more outliers (not for N:M)",
    )
    owl_limit: float = Field(0.08, gt=0, lt=0.5, description="owl: how far a block's sparsity may be from the mean")
    owl_threshold: float = Field(5.0, gt=1, description="owl: above so many times the mean Wanda score is an outlier")
    refine: Literal["dsnot"] | None = Field(
        None, description="afterwards exchange removed and kept weights, without training (not for sparsegpt)"
    )
    reconstruct: str | None = Field(
        None,
        description="afterwards tune what is left of each block towards its dense outputs: block (all at once), "
        "attention, mlp, or attention,mlp (one after the other)",
    )
    reconstruct_params: Literal["weights", "spp"] = Field(
        "weights", description="what reconstruction tunes: the weights that are left, or SPP's A and B"
    )
    reconstruct_epochs: int = Field(8, ge=1, description="passes of reconstruction over the calibration windows")
    reconstruct_learning_rate: float | None = Field(
        None,
        gt=0,
        description="peak learning rate of reconstruction (default: 0.1 for spp; 0.05 for weights, times their size)",
    )
    keep_zeros: bool = Field(
        False, description="prune nothing, and adopt the zeros that the model has; pattern and criterion do not count"
    )
    calibration: str | None = Field(
        None,
        description="calibration text: a file or datasets id (default: spp run's training data, else python-stdlib)",
    )
    samples: int = Field(128, ge=1, description="calibration windows")
    min_expert_tokens: int = Field(
        64, ge=0, description="an expert that fewer calibration tokens reach is pruned by magnitude"
    )
    skip_indivisible: bool = Field(
        False, description="leave a layer dense, and say so, where M does not divide its input dimension"
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
    if settings.allocation == "owl" and ":" in settings.pattern:
        problems.append(f"allocation owl varies the sparsity, and pattern {settings.pattern} fixes it; give 50% or so")
    if settings.refine and settings.criterion == "sparsegpt":
        problems.append("refine dsnot exchanges weights, and sparsegpt has changed them; use wanda, ria or magnitude")
    if odd := [part for part in settings.reconstructed_parts if part not in get_args(BlockPart)]:
        problems.append(f"reconstruct takes block, attention, mlp, or attention,mlp, and not {odd[0]!r}")
    given = [
        name.replace("_", "-")
        for name in ("pattern", "criterion", "allocation", "refine", "reconstruct")
        if getattr(settings, name) != PruningSettings.model_fields[name].default
    ]
    if settings.keep_zeros and given:
        problems.append(f"keep-zeros prunes nothing, so leave out {', '.join(given)}")
    return problems


class AdapterSettings(Options):
    """The SPP adapter: W' = W + scale * W * (A[group] B)."""

    rank: int | None = Field(None, ge=1, description="row groups R of every layer (default: see lora-rank)")
    lora_rank: int = Field(
        16, ge=1, description="unless rank is given: in each layer as many parameters as LoRA of this rank has"
    )
    directions: int = Field(
        4, ge=1, le=16, description="directions K, rows of A for each group, which its rows mix; 1 is as published"
    )
    scale: float = Field(2.0, gt=0, description="factor s of the update s * W * (A[group] B)")
    init: Literal["ones", "published"] = Field(
        "ones", description="ones: A = 0 and a 1 in each row of B; published: A at random within 1/sqrt(I), and B = 0"
    )
    mode: Literal["fused", "split"] = Field(
        "fused",
        description="fused: three GEMMs a step, on the merged weight rounded once; split: four, and updates too small "
        "to change a bfloat16 weight still count",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter branch; above 0 costs one more GEMM")
    target_modules: str = Field(
        "all-linear", description="modules to adapt: all-linear, or names separated by commas (q_proj,v_proj)"
    )


class ExampleSettings(Options):
    """How text becomes examples to train on."""

    packing: bool | None = Field(
        None,
        description="join documents and cut them into full windows "
        "(default: where documents are longer than a window on average)",
    )
    max_tokens: int | None = Field(
        None, ge=2, description="read only the first so many tokens of the data, as a stream (default: all of it)"
    )
    completion_only: bool = Field(
        False, description="loss on answers alone: completions, Alpaca's output, the assistant's messages"
    )


class TeacherSettings(Options):
    """Learning from the dense model as well as from the data."""

    teacher: str | None = Field(
        None, description="dense model to learn from: a folder, a hub id, or what spp cache-teacher wrote"
    )
    teacher_weight: float = Field(
        0.5, ge=0, le=1, description="share of the loss that is the divergence from the teacher; the rest is the data's"
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


class TrainingSettings(AdapterSettings, ExampleSettings, TeacherSettings):
    """How the adapter is trained. `recipes/paper.yaml` has the published values."""

    learning_rate: float = Field(2e-2, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay on A and B")
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="share of the steps over which the rate rises")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="how the rate falls after warm-up")
    epochs: float = Field(1.0, gt=0, description="passes over the training data")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimiser steps, whatever the epochs")
    batch_size: int = Field(8, ge=1, description="sequences per optimiser step, over all processes")
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
    save_steps: int = Field(100, ge=1, description="optimiser steps between checkpoints to resume from")
    keep: int = Field(2, ge=1, description="checkpoints to keep while training; the best adapter is kept besides")
    validation: int = Field(
        0, ge=0, description="hold out so many examples, and take the adapter that has the lowest loss on them"
    )
    eval_steps: int | None = Field(
        None, ge=1, description="optimiser steps between evaluations on the held-out examples (default: save-steps)"
    )
    sharding: Literal["none", "fsdp", "zero3"] = Field(
        "none",
        description="what several processes do with the model: none gives each all of it (DDP), fsdp and zero3 "
        "(DeepSpeed) a share",
    )
    report_to: str = Field(
        "none", description="also log to tensorboard, wandb, trackio, ... (names separated by commas)"
    )

    @model_validator(mode="after")
    def _check_base(self) -> Self:
        excluded = {"pack": self.pack is True, f"sharding {self.sharding}": self.sharding != "none"}
        if self.quantize != "none" and (names := [name for name, given in excluded.items() if given]):
            raise ValueError(f"quantize {self.quantize} does not go with {' or '.join(names)}; leave one of them out")
        return self


class WindowSettings(Options):
    """Windows of text, for calibration, training and evaluation."""

    window: int | None = Field(
        None, ge=2, description="tokens per window (default: 2048, or the model's context if shorter)"
    )


class SeedSettings(Options):
    """Randomness."""

    seed: int = Field(0, ge=0, lt=2**32, description="seed of sampling, initialisation, order and rounding")


class ScoringSettings(Options):
    """How text is scored."""

    per_document: bool | None = Field(
        None,
        description="score each document by itself instead of windows over the joined text "
        "(default: for .jsonl, .json, .parquet and datasets ids)",
    )
    limit: int | None = Field(None, ge=1, description="score only the first so many documents, or items of each task")


class TaskSettings(Options):
    """Tasks, which lm-eval scores."""

    tasks: str | None = Field(
        None,
        description="score tasks instead of a text: names that lm-eval knows, paper (the seven of the SPP paper), "
        ".jsonl files, or folders of them, separated by commas",
    )
    task_folder: Path | None = Field(
        None, description="take every task NAME from the file NAME.jsonl in this folder, and nothing from the hub"
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="solved examples in front of each item (default: the task's own)"
    )
    batch_size: int = Field(8, ge=1, description="answers that are scored at once")

    @property
    def task_names(self) -> list[str]:
        """What `tasks` lists."""
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]


class PruneOptions(PruningSettings, WindowSettings, SeedSettings, LoadingOptions, OutputOptions):
    """`spp prune MODEL OUT`: remove weights from a dense model."""

    model: str = Field(description="dense model: a folder or a hub id")
    out: Path = Field(description="folder for the pruned model")


class TrainOptions(TrainingSettings, WindowSettings, SeedSettings, LoadingOptions, OutputOptions):
    """`spp train MODEL OUT --data FILE`: fine-tune a sparse model with SPP."""

    model: str = Field(description="sparse model, whoever pruned it: a folder or a hub id")
    out: Path = Field(description="folder for the adapter")
    data: str = Field("python-stdlib", description="training data: a file, a datasets id, or python-stdlib")


class CacheTeacherOptions(ExampleSettings, WindowSettings, LoadingOptions, OutputOptions):
    """`spp cache-teacher MODEL OUT --data FILE`: ask a dense model once, so that training holds one model only."""

    model: str = Field(description="dense model: a folder or a hub id")
    out: Path = Field(description="folder for its answers, to be given to spp train as --teacher")
    data: str = Field("python-stdlib", description="training data: a file, a datasets id, or python-stdlib")
    top_k: int = Field(64, ge=1, description="keep so many of the likeliest tokens of each distribution")
    temperature: float = Field(1.0, gt=0, description="temperature of the distributions")


class MergingSettings(Options):
    """Merging."""

    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest",
        description="how merged weights are rounded; stochastic keeps, in the mean, updates that the dtype is too "
        "coarse for; the seed fixes its bits",
    )


class MergeOptions(MergingSettings, SeedSettings, OutputOptions):
    """`spp merge MODEL ADAPTER OUT`: fold an adapter into its model and prove that the zeros stayed."""

    model: str = Field(description="the sparse model that the adapter was trained on: a folder or a hub id")
    adapter: Path = Field(description="folder of the SPP adapter")
    out: Path = Field(description="folder for the merged model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the result; auto leaves every tensor its own"
    )


class ConvertOptions(OutputOptions):
    """`spp convert ADAPTER OUT`: make an SPP adapter a HiRA adapter, which stock PEFT loads, or the other way round."""

    adapter: Path = Field(description="folder of an SPP adapter, a HiRA adapter, or one of the published SPP code")
    out: Path = Field(description="folder for the converted adapter")
    to: Literal["spp", "hira"] | None = Field(
        None, description="what to write (default: hira from an SPP adapter, spp from any other)"
    )
    base: str | None = Field(
        None, description="the sparse model it belongs to, a folder or a hub id: shapes are checked, and the name noted"
    )


class VerifyOptions(Options):
    """`spp verify BASE OTHER`: prove that every zero of BASE is an exact +0.0 in OTHER."""

    base: str = Field(description="the model whose zeros count: a folder or a hub id")
    other: str = Field(description="the model to check: a folder or a hub id")
    pattern: PatternText | None = Field(
        None, description="also check that the sparse weights of OTHER obey this pattern"
    )


class EvalOptions(TaskSettings, ScoringSettings, WindowSettings, LoadingOptions):
    """`spp eval MODEL --text FILE`: perplexity or task scores of a model, or of several side by side."""

    model: str = Field(description="a folder or a hub id, plain or packed; or an adapter's folder")
    others: tuple[str, ...] = Field((), description="more models, to be shown side by side")
    adapter: Path | None = Field(None, description="folder of an adapter to evaluate on top of the model")
    text: str = Field("python-stdlib", description="evaluation text: a file, a datasets id, or python-stdlib")
    compare: bool = Field(False, description="also plot the scores of several models")
    plot: Path = Field(Path("comparison.svg"), description="file for the plot of --compare")
    overwrite: bool = Field(False, description="replace the plot if it exists")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        given = [name for name in ("text", "per_document") if name in self.model_fields_set]
        problems = []
        if self.tasks is not None and given:
            problems.append(
                f"{' and '.join(given).replace('_', '-')}: tasks bring their own text; leave one of them out"
            )
        if self.tasks is None and (self.task_folder is not None or self.num_fewshot is not None):
            problems.append("task-folder and num-fewshot are for tasks; pass --tasks")
        if self.others and self.adapter is not None:
            problems.append("adapter goes with one model; give the adapter's folder as one of the models")
        if not self.others and (self.compare or "plot" in self.model_fields_set):
            problems.append("compare and plot need two models or more")
        elif "plot" in self.model_fields_set and not self.compare:
            problems.append("plot is where --compare draws; pass --compare too")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class PackOptions(OutputOptions):
    """`spp pack MODEL OUT`: write a sparse model as a packed archive, without its zeros."""

    model: str = Field(description="sparse model: a folder or a hub id")
    out: Path = Field(description="folder for the archive")


class UnpackOptions(OutputOptions):
    """`spp unpack ARCHIVE OUT`: write a packed archive as plain safetensors, which load anywhere."""

    model: str = Field(description="packed archive: a folder or a hub id")
    out: Path = Field(description="folder for the model")


class GenerateOptions(SeedSettings, LoadingOptions):
    """`spp generate MODEL --prompt TEXT`: continue a text, and say how fast and in how much memory."""

    model: str = Field(description="a folder or a hub id, plain or packed")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype to compute in; auto is the checkpoint's own"
    )
    adapter: Path | None = Field(None, description="folder of an adapter to use on top of the model")
    prompt: str = Field(min_length=1, description="text to continue")
    max_new_tokens: int = Field(64, ge=1, description="stop after so many tokens")
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token; above, draw at this temperature")
    pack: bool | None = Field(None, description="keep sparse weights packed (default: where 30 % or more are zero)")


class InspectOptions(Options):
    """`spp inspect MODEL`: sparsity and detected pattern of every weight matrix."""

    model: str = Field(description="a folder or a hub id")


class PushOptions(Options):
    """`spp push MODEL REPO`: upload a model to the hub, with a card that says what was proved."""

    model: Path = Field(description="folder of a model that spp wrote: merged, pruned or packed")
    repo: str = Field(description="where to on the hub: USER/NAME; made if it is not there")
    private: bool = Field(False, description="make the repository private where it is new")


class ReportOptions(Options):
    """`spp report RUN [RUN ...]`: one page about the results of one run or of several."""

    runs: tuple[Path, ...] = Field(min_length=1, description="folders that spp run wrote, or their results.json")
    out: Path = Field(Path("report.html"), description="HTML file for the page")
    benchmarks: tuple[Path, ...] = Field(
        (), description="CSV files of benchmark rows, as the scripts in benchmarks/ write them, to show as well"
    )
    overwrite: bool = Field(False, description="replace the output file if it exists")


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

    model: str | None = Field(None, description="dense model: a folder or a hub id (default: the bundled one)")
    train: str = Field("python-stdlib", description="training data: a file, a datasets id, or python-stdlib")
    eval: str = Field("python-stdlib", description="evaluation text: a file, a datasets id, or python-stdlib")
    out: Path | None = Field(None, description="output folder (default: runs/<date-time>)")
