"""What `spp run` finds out, as its results.json holds it: the pipeline writes these models, and the report reads them.

A file of an older version, or one that was cut down by hand, may lack nearly everything. What it lacks, or has a null
for, is None, and empty where it is a list, a mapping or a part. What a newer version added is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, WrapValidator, field_validator


def _as_written(value: Any, check: Callable[[Any], float]) -> Any:
    check(value)
    return value


Number = Annotated[float, WrapValidator(_as_written)]
"""A number that stays what it is: 150 does not become 150.0, which would be written and shown in another way."""

Point = Annotated[list[Number], Field(min_length=2, max_length=2)]
"""Optimizer step, and loss in nats per token."""


class _Part(BaseModel):
    """Base of all parts. Fields are in the order that they have in the file."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_missing(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        return field.get_default(call_default_factory=True) if value is None and not field.is_required() else value

    def plain(self) -> dict[str, Any]:
        """What is known, as values that JSON has; a field that was not given is left out."""
        return self.model_dump(exclude_unset=True)


class Protocol(_Part):
    """How the run was done.

    Attributes:
        model: what was pruned: a folder or a hub id, or "bundled".
        pattern: what the zeros obey; where zeros were only adopted, what was found.
        criterion: name of what decided which weights go; None where zeros were only adopted.
        criterion_title: the criterion as papers write it.
        calibration: what its statistics were taken from; None for a criterion that needs none.
        train: the training data.
        evaluation: how perplexity was measured: text, window, stride, dtype, tokens and so on, and the dense model's
            seconds.
        seed: of sampling, initialization, order and rounding.
    """

    model: str | None = None
    pattern: str | None = None
    criterion: str | None = None
    criterion_title: str | None = None
    calibration: dict[str, Any] | None = None
    train: str | None = None
    evaluation: dict[str, Any] = {}
    seed: int | None = None


class Training(_Part):
    """How the adapter was trained: the report of `spp train`.

    Attributes:
        out: the adapter's folder.
        data: the training data.
        steps: optimizer steps.
        examples: sequences to train on, after joining documents.
        tokens: tokens trained on, without padding.
        window: most tokens in a sequence.
        join_documents: whether a sequence may hold several documents.
        seconds: time in training, without loading.
        tokens_per_second: `tokens` by `seconds`.
        trainable_parameters: entries of the factors.
        sparsity: share of zeros in the adapted weights.
        packed: how many of the adapted weights were packed.
        learning_rate: its peak.
        batch_size: sequences of an optimizer step.
        peak_memory_bytes: on the device where it is CUDA, else of the process.
        losses: the mean loss of every optimizer step's batch.
        validation: the mean loss on the examples that were held out, for every evaluation.
        best_step: after which the adapter was as it was written; None where nothing was held out.
    """

    out: str | None = None
    data: str | None = None
    steps: int | None = None
    examples: int | None = None
    tokens: int | None = None
    window: int | None = None
    join_documents: bool | None = None
    seconds: Number | None = None
    tokens_per_second: Number | None = None
    trainable_parameters: int | None = None
    sparsity: Number | None = None
    packed: int | None = None
    learning_rate: Number | None = None
    batch_size: int | None = None
    peak_memory_bytes: int | None = None
    losses: list[Point] = []
    validation: list[Point] = []
    best_step: int | None = None


class PrunedTensor(_Part):
    """A tensor as pruning left it.

    Attributes:
        sparsity: share of zeros.
        transposed: whether the file holds it as (I, O) instead of (O, I).
    """

    sparsity: Number | None = None
    transposed: bool | None = None


class Sparsity(_Part):
    """What pruning did.

    Attributes:
        overall: share of zeros over all pruned tensors.
        tensors: each pruned tensor, by its name in the file.
        skipped: layers left dense because the pattern does not divide them.
    """

    overall: Number | None = None
    tensors: dict[str, PrunedTensor] = {}
    skipped: list[str] = []


class ComparedTensor(_Part):
    """How a tensor of the merged model compares with that of the pruned one; all but the last are counts of entries.

    Attributes:
        zeros: zeros of the pruned one, of either sign.
        offenders: those of them that are anything but an exact +0.0 in the merged one.
        negative_zeros: those of the offenders that are -0.0.
        survivors: non-zeros of the pruned one.
        underflowed: survivors that became zero.
        unchanged: survivors with the same value as before.
        sign_flips: survivors that changed sign.
        non_finite: NaN or infinity where the pruned one was finite.
        largest_relative_change: largest |after - before| / |before| over finite survivors.
    """

    zeros: int | None = None
    offenders: int | None = None
    negative_zeros: int | None = None
    survivors: int | None = None
    underflowed: int | None = None
    unchanged: int | None = None
    sign_flips: int | None = None
    non_finite: int | None = None
    largest_relative_change: Number | None = None

    @property
    def failed(self) -> bool:
        """Whether it breaks the promise: a zero that is none any more, or a new NaN or infinity."""
        return bool(self.offenders or self.non_finite)


class Verification(_Part):
    """The proof that the zeros were kept: the report of `spp verify`.

    Attributes:
        verified: whether they were, and whatever else was asked for holds.
        base: the pruned model.
        other: the merged model.
        pattern: what the matrices were checked against; None where nothing was asked for.
        zeros: zeros of the pruned model, over all tensors.
        tensors: each tensor that has zeros or differs, by its name in the file.
        problems: what is wrong, one sentence each; empty where verified.
    """

    verified: bool | None = None
    base: str | None = None
    other: str | None = None
    pattern: str | None = None
    zeros: int | None = None
    tensors: dict[str, ComparedTensor] = {}
    problems: list[str] = []


class RunResults(_Part):
    """What results.json holds.

    Attributes:
        perplexity: that of the `dense`, the `pruned` and the fine-tuned model, `spp`, per token; it may be infinite.
        gap_closed: `gap_closed` of the three.
        verified: whether the zeros were proved kept.
        seconds: time of each stage, in the order that they ran in.
        peak_rss_bytes: largest resident memory of the process, over all stages.
        protocol: how the run was done.
        versions: of spp, Python and packages; None where one is missing.
        environment: the hardware.
        options: every option of the run.
        command: a command line that repeats the run.
        training: how the adapter was trained.
        sparsity: what pruning did.
        verification: the proof that the zeros were kept.
    """

    perplexity: dict[str, Number | None]
    gap_closed: Number | None = None
    verified: bool | None = None
    seconds: dict[str, Number] = {}
    peak_rss_bytes: Number | None = None
    protocol: Protocol
    versions: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    options: dict[str, Any] = {}
    command: str | None = None
    training: Training = Training()
    sparsity: Sparsity = Sparsity()
    verification: Verification = Verification()


def gap_closed(dense: float, pruned: float, spp: float) -> float | None:
    """Share of the loss that pruning cost and fine-tuning won back, from three perplexities.

    (log ppl_pruned - log ppl_spp) / (log ppl_pruned - log ppl_dense): 0 is the pruned model, 1 the dense one. It
    is above 1 where fine-tuning also taught something new. None where pruning did not cost anything.
    """
    cost = math.log(pruned) - math.log(dense)
    return (math.log(pruned) - math.log(spp)) / cost if cost > 0 else None
