"""Fine-tune a sparse model, with SPP or in full: transformers' Trainer with our examples, operator and checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from spp._version import __version__
from spp.adapters.options import AdapterSettings
from spp.adapters.tuner.suitability import warn_if_dense
from spp.checkpoints.adapter_card import write_adapter_card
from spp.checkpoints.atomic_folder import check_output, partial_folder, resumable_folder, work_folder
from spp.checkpoints.checkpoint import MANIFEST, Checkpoint
from spp.checkpoints.fingerprint import WEIGHTS_OF_MODEL, model_digests
from spp.checkpoints.hub import resolve_model
from spp.checkpoints.json_files import write_json
from spp.checkpoints.request import Request
from spp.data.examples import Example, digest
from spp.models.architecture import sparsity
from spp.models.experts import Stack
from spp.models.loading import context_window, load_base, load_config, load_model
from spp.models.packed_linear import PackedLinear
from spp.models.quantized import quantize_
from spp.runtime import distributed
from spp.runtime.devices import pick_device, training_dtype
from spp.runtime.files import writing
from spp.runtime.memory import freed_memory_kept, peak_memory_bytes, return_freed_memory
from spp.training.checks import check_settings
from spp.training.learning_rate import learning_rate
from spp.training.memory_estimate import needs_checkpointing
from spp.training.new_adapter import target_layers, target_stacks, with_new_adapter
from spp.training.options import TrainingSettings, TrainOptions
from spp.training.teacher import open_teacher, teacher_digest
from spp.training.trained_model import require_zeros, whole_layers, with_trained_values, write_trained_model
from spp.training.trainer_arguments import batching
from spp.training.training_data import hold_out, training_examples
from spp.training.training_run import TrainingResult, TrainingRun

logger = logging.getLogger("spp")


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """The result of `train`.

    Attributes:
        steps: optimizer steps.
        examples: sequences to train on, after documents were joined.
        tokens: tokens trained on, without padding.
        seconds: time in training, without loading; like `tokens` it includes what was done before a resume.
        trainable_parameters: entries of A and B, or values of weights.
        learning_rate: the peak learning rate.
        rates_tried: (learning rate, loss on held-out examples) of every trial that learning-rate auto made.
        sparsity: share of zeros in the weights that are adapted or trained.
        packed: number of these weights that are packed.
        peak_memory_bytes: peak on a CUDA device; elsewhere the peak of the process.
        losses: (step, mean loss of its batch in nats per token), for every step.
        validation: (step, mean loss on the examples that were held out in nats per token), for every evaluation,
            the first before training.
        best_step: step whose result was written, 0 if training only made it worse; None if no examples were held out.
        zeros: zeros that are proved kept in the model that was written; None for an adapter.
    """

    out: Path
    method: str
    data: str
    steps: int
    examples: int
    tokens: int
    window: int
    join_documents: bool
    seconds: float
    tokens_per_second: float
    trainable_parameters: int
    sparsity: float
    packed: int
    learning_rate: float
    rates_tried: list[tuple[float, float]]
    batch_size: int
    peak_memory_bytes: int
    losses: list[tuple[float, float]]
    validation: list[tuple[float, float]]
    best_step: int | None
    zeros: int | None = None


def train(options: TrainOptions) -> TrainReport:
    """Train an SPP adapter for a sparse model, or the model itself, and write it to `options.out`.

    A killed run is resumed. Until the result is written, checkpoints are in a hidden folder beside it, `.<out>.work`.

    Raises:
        UsageError: a wrong option, a missing model or file, a full output folder, modules that the model lacks.
        SppError: a damaged model, or a loss or weight that is not finite.
    """
    folder = resolve_model(options.model, code=options.trust_remote_code)
    _check(options, folder)
    is_first = distributed.launched_rank() == 0
    inputs = model_digests(folder) if is_first else {}
    device = pick_device(options.device)
    model = _load_base(options, folder, device)
    data = _load_data(options, folder, model)
    teacher = open_teacher(options, data.examples, _vocabulary(model), device)
    targets, stacks, share_of_zeros = _weights_to_train(options, model)
    checkpointing = _use_checkpointing(options, model, data.examples, device)
    if options.quantize != "none":
        targets = quantize_(model, targets, options.quantize, device)
    set_seed(options.seed)
    if in_full := options.method == "full":
        trained = with_trained_values(model, targets)
    else:
        trained = with_new_adapter(model, targets, options, stacks=stacks)
    request = _request(options, inputs, data.examples, model.dtype) if is_first else None
    with _output(options, request) as (out, work):
        items, held_out = hold_out(data.examples, options)
        new_run = partial(
            TrainingRun, trained, items, held_out, teacher, device=device, gradient_checkpointing=checkpointing
        )
        with freed_memory_kept(device.type == "cpu" and not checkpointing):
            rate, tried = learning_rate(options, trained, len(items), new_run, work)
            result = new_run(options, rate, folder=work).run()
        report = _report(options, data, targets, share_of_zeros, result, rate, tried)
        layers = whole_layers(model, result.trained) if in_full else {}
        if is_first and isinstance(trained, PeftModel):
            _write_adapter(out, options, inputs[WEIGHTS_OF_MODEL], trained, result.trained, report)
        elif is_first:
            training = _training(options, report)
            written = write_trained_model(Checkpoint.open(folder), layers, options, training, folder=out, work=work)
            report = replace(report, zeros=written.zeros)
    return report


@contextmanager
def _output(options: TrainOptions, request: Request | None) -> Iterator[tuple[Path, Path]]:
    """The folders for the result and for checkpoints; the first process, which has a request, makes them.

    The others wait for it when the Trainer starts, so the folders exist before they use them.
    """
    if request is not None:
        with resumable_folder(options.out, request, overwrite=options.overwrite, keep_after_failure=True) as folders:
            yield folders
    else:
        yield partial_folder(options.out), work_folder(options.out)


def _weights_to_train(
    options: TrainOptions, model: PreTrainedModel
) -> tuple[dict[str, nn.Module], dict[str, Stack], float]:
    """Linear layers and stacks of experts by their full names, and the share of zeros in their weights."""
    in_full = options.method == "full"
    layers = target_layers(model, options.target_modules)
    stacks = {} if in_full else target_stacks(model, options.target_modules)
    zeros = sparsity(layers.values(), (stack.weight.detach() for stack in stacks.values()))
    if in_full:
        require_zeros(zeros, options.model)
    if in_full or options.quantize != "none":  # later, no zeros can be counted; otherwise the tuner does so
        warn_if_dense(options.model, zeros)
    return layers, stacks, zeros


@dataclass(frozen=True)
class _Data:
    """Training and held-out examples, the most tokens of an example, and whether documents were joined."""

    examples: list[Example]
    window: int
    join_documents: bool


def _check(options: TrainOptions, folder: Path) -> None:
    """Check the request before anything is loaded."""
    source = Checkpoint.open(folder)
    check_output(options.out, options.overwrite, inputs=(folder,))
    source.require_unquantized("give the sparse model as it was before quantization")
    _ = source.manifest  # a damaged one is not to be found when the new model's is made, after the training
    check_settings(options)


def _load_base(options: TrainOptions, folder: Path, device: torch.device) -> PreTrainedModel:
    """The sparse model, on the CPU: the Trainer moves it to the device, and each of several processes has its own."""
    dtype = training_dtype(options.dtype, device, load_config(folder, options).dtype)
    if options.method == "full":
        return load_model(folder, options, dtype=dtype, device="cpu", pack=True)
    pack = False if options.quantize != "none" else options.pack
    return load_base(folder, options, dtype=dtype, pack=pack, on=device)


def _load_data(options: TrainOptions, folder: Path, model: PreTrainedModel) -> _Data:
    window = context_window(model.config, options.window)
    examples, joined = training_examples(options, folder, window, _vocabulary(model))
    return _Data(examples, window, joined)


def _vocabulary(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size


def _use_checkpointing(
    options: TrainOptions, model: PreTrainedModel, examples: Sequence[Example], device: torch.device
) -> bool:
    """Whether to recompute activations in backward; if so on a CPU, freed memory is returned from now on."""
    sequences, _ = batching(options)
    batch = torch.Size((sequences, max(len(one.input_ids) for one in examples)))
    checkpointing = needs_checkpointing(options, model, batch, device)
    if checkpointing and options.gradient_checkpointing is None:
        logger.info("gradient checkpointing is on: the batch would not fit into memory without")
    if checkpointing and device.type == "cpu":
        return_freed_memory()  # where memory counts more than speed, anyway
    return checkpointing


def _report(
    options: TrainOptions,
    data: _Data,
    targets: Mapping[str, nn.Module],
    share_of_zeros: float,
    result: TrainingResult,
    rate: float,
    tried: Mapping[float, float],
) -> TrainReport:
    return TrainReport(
        out=options.out,
        method=options.method,
        data=options.data,
        steps=result.steps,
        examples=len(data.examples) - options.held_out,
        tokens=result.tokens,
        window=data.window,
        join_documents=data.join_documents,
        seconds=result.seconds,
        tokens_per_second=result.tokens / max(result.seconds, 1e-9),
        trainable_parameters=sum(factor.numel() for factor in result.trained.values()),
        sparsity=share_of_zeros,
        packed=sum(isinstance(one, PackedLinear) for one in targets.values()),
        learning_rate=rate,
        rates_tried=sorted(tried.items()),
        batch_size=options.batch_size,
        peak_memory_bytes=peak_memory_bytes(result.device),
        losses=result.losses,
        validation=result.validation,
        best_step=result.best_step,
    )


def _write_adapter(
    out: Path, options: TrainOptions, base: str, adapted: PeftModel, factors: dict[str, Tensor], report: TrainReport
) -> None:
    """Write the adapter and its manifest."""
    # Only now: PEFT asks the hub about a hub id whenever it saves a checkpoint.
    adapted.peft_config["default"].base_model_name_or_path = options.model
    with writing(out):
        adapted.save_pretrained(str(out), state_dict=factors, save_embedding_layers=False)
    write_json(out / MANIFEST, _manifest(options, base, report))
    write_adapter_card(out)


def _request(options: TrainOptions, inputs: dict[str, str], examples: list[Example], dtype: torch.dtype) -> Request:
    """Everything that the result depends on; only checkpoints of the same request are resumed."""
    circumstances: dict[str, Any] = {"spp": __version__}
    if options.dtype == "auto":
        circumstances["dtype of auto"] = str(dtype).removeprefix("torch.")  # which depends on the device
    if options.sharding == "zero3":
        circumstances["processes"] = distributed.launched_world_size()  # DeepSpeed's checkpoints are of that number
    taught = {"training data": digest(examples), "teacher": teacher_digest(options)}
    return Request(options.of_the_result(), {**inputs, **taught}, circumstances)


def _training(options: TrainOptions, report: TrainReport) -> dict[str, Any]:
    """What a manifest says of the training."""
    unused = set(AdapterSettings.model_fields) - {"target_modules"} if options.method == "full" else set()
    named = {*TrainingSettings.model_fields, "window", "seed"} - unused
    settings = options.model_dump(mode="json", include=named)
    settings["learning_rate"] = report.learning_rate
    return {"data": options.data, "settings": settings, "steps": report.steps, "tokens": report.tokens}


def _manifest(options: TrainOptions, base: str, report: TrainReport) -> dict[str, Any]:
    return {
        "tool": "spp",
        "version": __version__,
        "kind": "adapter",
        "base": {"model": options.model, "fingerprint": base},
        **_training(options, report),
    }
