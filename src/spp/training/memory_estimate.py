"""Predict the memory of a training run, for `spp train --dry-run`.

Weights are counted from the files. A training step is traced on fake tensors, so that everything that the model saves
for backward is counted, without formulas for architectures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spp.checkpoints.checkpoint import Checkpoint
from spp.checkpoints.hub import resolve_model
from spp.models.architecture import prunable_linears, shape_oi, weight_oi
from spp.models.completeness import check_size
from spp.models.experts import trace_as_one_expert_
from spp.models.loading import building, context_window, kind_of, load_config
from spp.models.packed_linear import PackedLinear
from spp.models.trainable_values import trainable_values
from spp.models.weight_map import known_parts
from spp.ops import packs_well
from spp.ops.autograd import scratch_bytes
from spp.ops.packed import WORTH_PACKING, PackedWeight, packed_bytes, word_count
from spp.runtime.devices import pick_device, training_dtype
from spp.runtime.memory_estimate import MemoryPrediction, available_bytes, libraries
from spp.runtime.progress import track
from spp.runtime.tensor_memory import peak_of_a_step
from spp.training.new_adapter import target_layers, target_stacks, with_new_adapter
from spp.training.options import TrainOptions
from spp.training.teacher import cache_manifest, teacher_dtype
from spp.training.trainer_arguments import batching
from spp.training.training_data import training_examples

_SHARE_TO_USE = 0.9  # of what is free; the rest is for what no one counts
_PLAINLY_FITS = 0.25
_NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # of a weight: 4 bits, a byte for 64 of them, a float for 256 of those
_FEWEST_IN_8_BITS = 4096  # entries; bitsandbytes keeps the moments of fewer in fp32
_COMPARED = 4  # fp32 matrices of predictions (tokens, vocabulary) beside those of the loss on the data
# What a C library's heap holds on to beyond the tensors that are alive. With checkpointing it is made not to. Measured
# with glibc on steps of a 67 M-parameter Llama: 0.30 to 0.50.
_HEAP_SLACK = 0.42


@dataclass(frozen=True, kw_only=True)
class TrainingPrediction(MemoryPrediction):
    """The predicted memory of a training run.

    Attributes:
        gradient_checkpointing: whether the run would use it.
        packed: number of layers whose weights would be packed.
        sequences, tokens: sequences of a batch on the device, and tokens of a sequence.
    """

    gradient_checkpointing: bool
    packed: int
    sequences: int
    tokens: int


def predict_training(options: TrainOptions) -> TrainingPrediction:
    """What `spp train` with these options would need; it reads the data and the weights, and writes nothing.

    Raises:
        UsageError: as `train`, for what can be wrong with the request.
        SppError: a damaged model.
    """
    checkpoint = Checkpoint.open(resolve_model(options.model, code=options.trust_remote_code))
    checkpoint.require_unquantized("give the sparse model as it was before quantization")
    config = load_config(checkpoint.folder, options)
    check_size(config, checkpoint)
    device = pick_device(options.device)
    sequences, _ = batching(options)
    examples, _ = training_examples(
        options, checkpoint.folder, context_window(config, options.window), config.get_text_config().vocab_size
    )
    batch = torch.Size((sequences, max(len(one.input_ids) for one in examples)))
    skeleton = _skeleton(options, config, device)
    weights, packed, stored = _weights(checkpoint, skeleton, options, device)
    step = needs_of_a_step(options, config, batch, device, stored)
    checkpointing = options.gradient_checkpointing
    if checkpointing is None:
        checkpointing = sum(weights.values()) + sum(step.values()) > _SHARE_TO_USE * available_bytes(device)
    if checkpointing:
        step = needs_of_a_step(options, config, batch, device, stored, checkpointing=True)
    return TrainingPrediction(
        parts={
            **libraries("spp.training.train", device),
            **weights,
            **step,
            **_teacher(options, config, batch, device),
        },
        available=available_bytes(device),
        device=str(device),
        gradient_checkpointing=checkpointing,
        packed=packed,
        sequences=batch[0],
        tokens=batch[1],
    )


def _teacher(options: TrainOptions, config: Any, batch: torch.Size, device: torch.device) -> dict[str, int]:
    """Bytes of the teacher, by part."""
    if options.teacher is None:
        return {}
    predictions = {"comparing predictions": _COMPARED * 4 * batch.numel() * config.get_text_config().vocab_size}
    folder = resolve_model(options.teacher)
    if cache_manifest(folder) is not None:
        return predictions
    entries = sum(torch.Size(layout.shape).numel() for layout in Checkpoint.open(folder).layouts.values())
    return {"teacher": entries * teacher_dtype(options, folder, device).itemsize, **predictions}


def needs_checkpointing(options: TrainOptions, model: PreTrainedModel, batch: torch.Size, device: torch.device) -> bool:
    """Whether a loaded model needs gradient checkpointing to be trained on batches of this shape.

    Args:
        options: of the run; what they say about checkpointing is followed.
        model: in the CPU's memory, without adapter.
        batch: sequences, tokens.
        device: to train on.
    """
    if options.gradient_checkpointing is not None:
        return options.gradient_checkpointing
    free = available_bytes(device)
    to_move = 0 if device.type == "cpu" else sum(parameter.nbytes for parameter in model.parameters())
    config = model.config.get_text_config()
    # Counting takes seconds. A decoder keeps about 32 tensors of the hidden size a layer, and four of logits.
    roughly = 4 * batch.numel() * (32 * config.hidden_size * config.num_hidden_layers + 4 * config.vocab_size)
    if to_move + roughly < _PLAINLY_FITS * free:
        return False
    stored = {name: _stored(layer) for name, layer in prunable_linears(model).items()}
    return to_move + sum(needs_of_a_step(options, model.config, batch, device, stored).values()) > _SHARE_TO_USE * free


def _stored(layer: nn.Module) -> int:
    """How many values of a layer are stored, packed."""
    if isinstance(layer, PackedLinear):
        return layer.values.numel()
    return int(layer.get_parameter("weight").count_nonzero())


def needs_of_a_step(
    options: TrainOptions,
    config: Any,
    batch: torch.Size,
    device: torch.device,
    stored: Mapping[str, int],
    *,
    checkpointing: bool = False,
) -> dict[str, int]:
    """Bytes by part that training takes besides the base's weights: adapter, optimizer, activations, scratch.

    Args:
        options: of the run.
        config: of the model.
        batch: sequences, tokens.
        device: to train on.
        stored: layer -> number of its values that are not zero, for training in full.
        checkpointing: whether activations are recomputed in backward.
    """
    model = _skeleton(options, config, device)
    targets = target_layers(model, options.target_modules, warn=False)
    traced = targets or prunable_linears(model)  # where experts alone are trained, for the activations
    shapes = (weight_oi(layer).shape for layer in traced.values())
    scratch = max(scratch_bytes(rows, columns, model.dtype, device) for rows, columns in shapes)
    in_full = options.method == "full"
    adapted = _with_values(model, targets, stored) if in_full else with_new_adapter(model, traced, options)
    trace_as_one_expert_(adapted)
    of_experts = [] if in_full else _factors_of_experts(options, config, device)
    sizes = of_experts + (_trained(adapted) if targets else [])
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    inputs: dict[str, torch.Size] = {name: batch for name in ("input_ids", "attention_mask", "labels")}
    step = peak_of_a_step(adapted.train(), inputs, device)
    slack = {} if checkpointing or device.type != "cpu" else {"allocator's slack": int(_HEAP_SLACK * step)}
    return {
        **({} if in_full else {"adapter": 4 * sum(sizes)}),  # trained values are among the weights
        "optimizer": _moments(options.optimizer, sizes),
        "activations and gradients": step + 4 * sum(of_experts),
        **slack,
        "scratch": scratch,
    }


def _factors_of_experts(options: TrainOptions, config: Any, device: torch.device) -> list[int]:
    """Entries of each factor on stacked experts, which are not traced."""
    model = _skeleton(options, config, device)
    if not (stacks := target_stacks(model, options.target_modules)):
        return []
    return _trained(with_new_adapter(model, {}, options, stacks=stacks))


def _trained(adapted: nn.Module) -> list[int]:
    """Number of entries of each trained parameter."""
    return [parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad]


def _moments(optimizer: str, sizes: Iterable[int]) -> int:
    """Bytes of AdamW's two moments of parameters of these sizes.

    bitsandbytes has moments in 8 bits with a scale in fp32 for each 256 of them, but small ones in fp32.
    """
    if optimizer == "adamw":
        return sum(2 * 4 * size for size in sizes)
    return sum(2 * (size + 4 * -(-size // 256)) if size >= _FEWEST_IN_8_BITS else 2 * 4 * size for size in sizes)


def _with_values(
    model: PreTrainedModel, targets: Mapping[str, nn.Module], stored: Mapping[str, int]
) -> PreTrainedModel:
    """Put packed layers with trainable values in the place of these layers of a model on the meta device."""
    for name, layer in targets.items():
        rows, columns = shape_oi(layer)
        with torch.device("meta"):
            values = torch.empty(stored.get(name, 0), dtype=torch.float32)
            bits = torch.empty(rows, word_count(columns), dtype=torch.int32)
            offsets = torch.empty(rows + 1, dtype=torch.int64)
        model.set_submodule(name, PackedLinear(PackedWeight(values, bits, offsets, columns), layer._parameters["bias"]))
    trainable_values(model, targets)
    model.config.use_cache = False
    return model


def _skeleton(options: TrainOptions, config: Any, device: torch.device) -> PreTrainedModel:
    """The model on the meta device, in the dtype that it would compute in."""
    dtype = training_dtype(options.dtype, device, config.dtype)
    dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
    kind = kind_of(options.model, config)
    with building(options.model, config), torch.device("meta"):
        return kind.from_config(config, dtype=dtype, trust_remote_code=options.trust_remote_code)


def _weights(
    checkpoint: Checkpoint, model: PreTrainedModel, options: TrainOptions, device: torch.device
) -> tuple[dict[str, int], int, dict[str, int]]:
    """Bytes of the base by part, how many layers would be packed, and how many values each layer has, as far as known.

    Weights that are trained are packed in fp32, whatever their sparsity.
    """
    linears = prunable_linears(model)
    if options.quantize != "none":
        return _quantized_weights(model, linears, options.quantize, device), 0, {}
    in_full = target_layers(model, options.target_modules, warn=False) if options.method == "full" else {}
    pack = (packs_well(device) if options.pack is None else options.pack) or (
        bool(checkpoint.packed) and options.pack is not False
    )
    parts = known_parts(model, checkpoint) if pack or in_full else {}
    kinds = {"packed weights": 0, "dense weights": 0}
    packed, stored = 0, {}
    for name, layer in track(linears.items(), "counting weights", total=len(linears)):
        tensors = [checkpoint.tensor(stored) for stored in parts.get(f"{name}.weight", {})]
        values = sum(int(tensor.count_nonzero()) for tensor in tensors)
        rows, columns = weight_oi(layer).shape
        stored[name] = values
        if name in in_full or (tensors and 1 - values / (rows * columns) >= WORTH_PACKING):
            dtype = torch.float32 if name in in_full else tensors[0].dtype
            kinds["packed weights"] += packed_bytes(values, rows, columns, dtype)
            packed += 1
        else:
            kinds["dense weights"] += layer.get_parameter("weight").nbytes
    return {**kinds, **_other_weights(model, linears)}, packed, stored


def _quantized_weights(
    model: PreTrainedModel, linears: dict[str, nn.Module], kind: str, device: torch.device
) -> dict[str, int]:
    shapes = [shape_oi(layer) for layer in linears.values()]
    of_an_entry = _NF4_BYTES if kind == "nf4" else 1.0
    dense = [layer.get_parameter("weight").nbytes for layer in linears.values()]
    return {
        "quantized weights": sum(math.ceil(rows * columns * of_an_entry) + 4 * rows for rows, columns in shapes),
        "dense weights, until they are quantized": sum(dense) if device.type == "cpu" else 0,
        "a weight, dequantized": max(dense),
        **_other_weights(model, linears),
    }


def _other_weights(model: PreTrainedModel, linears: dict[str, nn.Module]) -> dict[str, int]:
    counted = {id(layer.get_parameter("weight")) for layer in linears.values()}
    rest = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in counted)
    return {"embeddings, head, norms": rest}
