"""The content of results.json: models that `spp run` writes and the report reads.

A file of an older version, or one that was shortened by hand, may lack nearly every field. A field that is missing or
null is None; a list, a mapping or a part is empty instead. Fields that a newer version added are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, WrapValidator, field_validator


def _as_written(value: Any, check: Callable[[Any], float]) -> Any:
    if isinstance(value, int) and abs(value) >= 2**63:  # nothing that is measured is so large
        raise ValueError("input should fit into 64 bits")
    check(value)
    return value


Number = Annotated[float, WrapValidator(_as_written)]
"""A number that keeps its type: 150 does not become 150.0, which would be written and shown differently."""

Count = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""An integer that fits into 64 bits, with which all arithmetic is possible."""

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
        """The fields as JSON values; a field that was not given is left out."""
        return self.model_dump(exclude_unset=True)


class Protocol(_Part):
    """How the run was done.

    Attributes:
        model: the dense model: a folder or a hub id, or "bundled".
        pattern: the pattern of the zeros; if existing zeros were kept (keep_zeros), the pattern that was detected.
        criterion: name of the pruning criterion; None if existing zeros were kept.
        criterion_title: the criterion as papers write it.
        calibration: the calibration text; None for a criterion that needs none.
        train: the training data.
        evaluation: how perplexity was measured: text, window, stride, dtype, tokens and so on, and the time that the
            dense model took.
        seed: seed of sampling, initialization, order and rounding.
    """

    model: str | None = None
    pattern: str | None = None
    criterion: str | None = None
    criterion_title: str | None = None
    calibration: dict[str, Any] | None = None
    train: str | None = None
    evaluation: dict[str, Any] = {}
    seed: Count | None = None


class Training(_Part):
    """How the model was trained: the report of `spp train`.

    Attributes:
        out: the folder of the adapter, or of the model that was trained in full.
        method: spp, or full.
        data: the training data.
        steps: optimizer steps.
        examples: sequences to train on, after joining documents.
        tokens: tokens trained on, without padding.
        window: most tokens in a sequence.
        join_documents: whether a sequence may hold several documents.
        seconds: time in training, without loading.
        tokens_per_second: `tokens` / `seconds`.
        trainable_parameters: number of entries in A and B, or of values.
        sparsity: share of zeros in the adapted weights.
        packed: number of adapted weights that were packed.
        learning_rate: the peak learning rate.
        rates_tried: the validation loss after a short trial with each learning rate that was tried.
        batch_size: sequences per optimizer step.
        peak_memory_bytes: peak on a CUDA device; elsewhere the peak of the process.
        losses: the mean loss of every optimizer step's batch.
        validation: the mean loss on the examples that were held out, for every evaluation.
        best_step: step whose result was written, 0 if training only did harm; None if no examples were held out.
        zeros: zeros that were proved kept when the model was written; None for an adapter.
    """

    out: str | None = None
    method: str | None = None
    data: str | None = None
    steps: Count | None = None
    examples: Count | None = None
    tokens: Count | None = None
    window: Count | None = None
    join_documents: bool | None = None
    seconds: Number | None = None
    tokens_per_second: Number | None = None
    trainable_parameters: Count | None = None
    sparsity: Number | None = None
    packed: Count | None = None
    learning_rate: Number | None = None
    rates_tried: list[Point] = []
    batch_size: Count | None = None
    peak_memory_bytes: Count | None = None
    losses: list[Point] = []
    validation: list[Point] = []
    best_step: Count | None = None
    zeros: Count | None = None


class PrunedTensor(_Part):
    """A pruned tensor.

    Attributes:
        sparsity: share of zeros.
        transposed: whether the file holds it as (I, O) instead of (O, I).
    """

    sparsity: Number | None = None
    transposed: bool | None = None


class Sparsity(_Part):
    """The sparsity after pruning.

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
        offenders: zeros of the pruned one that are not an exact +0.0 in the merged one.
        negative_zeros: offenders that are -0.0.
        survivors: non-zeros of the pruned one.
        underflowed: survivors that became zero.
        unchanged: survivors with the same value as before.
        sign_flips: survivors that changed sign.
        non_finite: NaN or infinity where the pruned one was finite.
        largest_relative_change: largest |after - before| / |before| over finite survivors.
    """

    zeros: Count | None = None
    offenders: Count | None = None
    negative_zeros: Count | None = None
    survivors: Count | None = None
    underflowed: Count | None = None
    unchanged: Count | None = None
    sign_flips: Count | None = None
    non_finite: Count | None = None
    largest_relative_change: Number | None = None

    @property
    def failed(self) -> bool:
        """Whether a zero was lost, or there is a new NaN or infinity."""
        return bool(self.offenders or self.non_finite)


class Verification(_Part):
    """The proof that the zeros were kept: the report of `spp verify`.

    Attributes:
        verified: whether all zeros were kept, and every further check that was requested passed.
        base: the pruned model.
        other: the merged model.
        record: file of the record that the model was checked against, where it was not compared with another one.
        pattern: pattern that the matrices were checked against; None if none was requested.
        zeros: zeros of the pruned model, over all tensors.
        tensors: each tensor that has zeros or differs, by its name in the file.
        problems: one sentence for each problem; empty if verified.
        compared: tensors that were looked into.
        replaced: tensors of which nothing is proved, because training replaced them whole, by dense weights.
        matrices_checked: matrices that were checked against the pattern, each expert by itself.
        matrices_dense: tensors with matrices that need not obey it.
        matrices_because: how it was known which have to obey.
        in_few_bits: tensors of the merged model whose survivors are stored in few bits.
        base_sha256, other_sha256: fingerprints of the tensors of either side.
    """

    verified: bool | None = None
    base: str | None = None
    other: str | None = None
    record: str | None = None
    pattern: str | None = None
    zeros: Count | None = None
    tensors: dict[str, ComparedTensor] = {}
    problems: list[str] = []
    compared: Count | None = None
    replaced: list[str] = []
    matrices_checked: Count | None = None
    matrices_dense: list[str] = []
    matrices_because: str | None = None
    in_few_bits: Count | None = None
    base_sha256: str | None = None
    other_sha256: str | None = None


class RunResults(_Part):
    """The content of results.json.

    Attributes:
        perplexity: per token, of the `dense`, the `pruned` and the fine-tuned model (`spp`), and of the `reconstructed`
            one between them where blocks were reconstructed; `pruned` is before that. It may be infinite.
        gap_closed: `gap_closed` of the three perplexities.
        verified: whether it was proved that all zeros were kept.
        seconds: time of each stage, in the order in which they ran.
        peak_rss_bytes: largest resident memory of the process, over all stages.
        protocol: how the run was done.
        versions: versions of spp, Python and packages; None for a missing package.
        environment: the hardware.
        options: every option of the run.
        command: a command line that repeats the run.
        training: how the model was trained.
        sparsity: the sparsity after pruning.
        verification: the proof that the zeros were kept.
        warnings: what a reader of the figures has to know, one sentence each.
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
    warnings: list[str] = []


_SMALLEST_GAP = math.log(1.01)


def gap_closed(dense: float, pruned: float, spp: float) -> float | None:
    """The share of the loss due to pruning that fine-tuning won back, from three perplexities.

    (log ppl_pruned - log ppl_spp) / (log ppl_pruned - log ppl_dense): 0 is the pruned model, 1 the dense one. It
    is above 1 if the fine-tuned model is better than the dense one. None if pruning raised the perplexity by less than
    1 %: there was no gap to close, and the quotient would be noise.
    """
    cost = math.log(pruned) - math.log(dense)
    return (math.log(pruned) - math.log(spp)) / cost if cost >= _SMALLEST_GAP else None


def warnings_about(perplexity: dict[str, float]) -> list[str]:
    """What a reader of the figures has to know: that fine-tuning made the model worse."""
    before, after = perplexity.get("reconstructed", perplexity["pruned"]), perplexity["spp"]
    if not after > before:
        return []
    return [
        f"fine-tuning made the model worse: its perplexity was {before:.4g} before and is {after:.4g} after; try a "
        "lower --learning-rate, more data or steps"
    ]
