"""Predict the memory of `spp eval --stream`: one block, or what is around the blocks, and a batch of hidden states.

The calls are traced on fake tensors, which computes nothing; the rest is sizes from the files' headers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from spp.errors import UsageError
from spp.evaluation.options import EvalOptions
from spp.evaluation.perplexity import losses_of, rows_at_once
from spp.evaluation.streaming import StreamedModel
from spp.evaluation.subjects import subjects_of
from spp.models.architecture import decoder_blocks
from spp.models.blockwise.traced import TracedBlock, heaviest_block, nbytes, traced
from spp.runtime.devices import pick_device
from spp.runtime.memory_estimate import MemoryPrediction, available_bytes, libraries
from spp.runtime.tensor_memory import LiveBytes


@dataclass(frozen=True, kw_only=True)
class StreamingPrediction(MemoryPrediction):
    """The predicted memory of an evaluation block by block, in the phase that takes most.

    Attributes:
        model: the model that takes most.
        phase: the phase that takes most.
        states_bytes: size of the hidden states of all models, which are on disk during the evaluation.
    """

    model: str
    phase: str
    states_bytes: int


def predict_streaming(options: EvalOptions) -> StreamingPrediction:
    """What `spp eval --stream` with these options would need; it reads headers and the text, and writes nothing.

    Raises:
        UsageError: as `evaluate`; or the evaluation is not one block by block.
        SppError: a damaged model.
    """
    if not options.stream:
        raise UsageError("dry-run foretells the memory of --stream; pass --stream too")
    device = pick_device(options.device)
    models = {name: StreamedModel(subject, device) for name, subject in subjects_of(options).items()}
    phases = {(name, phase): parts for name, model in models.items() for phase, parts in _phases(model, device).items()}
    (name, phase), parts = max(phases.items(), key=lambda item: sum(item[1].values()))
    return StreamingPrediction(
        parts={**libraries("spp.evaluation.evaluate", device), **parts},
        available=available_bytes(device),
        device=str(device),
        model=name,
        phase=phase,
        states_bytes=sum(model.states_bytes for model in models.values()),
    )


def _phases(model: StreamedModel, device: torch.device) -> dict[str, dict[str, int]]:
    """Phase -> bytes by part."""
    built = model.model
    heaviest = heaviest_block(built)
    block = nbytes(decoder_blocks(built)[1][heaviest].parameters())
    outside = nbytes(_outside(built, decoder_blocks(built)[1]))
    embeddings = nbytes(built.get_input_embeddings().parameters())
    stored = max(layout.nbytes for layout in model.checkpoint.layouts.values())
    largest = max(model.batches.values(), key=lambda batch: batch.ids.numel())
    rows = min(rows_at_once(model.vocabulary), largest.ids.shape[1])
    with traced(built, heaviest, largest.ids.shape, device) as one, torch.no_grad():
        with LiveBytes() as running:
            one.run()
        head = _head_bytes(one, rows)
    hidden = largest.ids.numel() * built.config.get_text_config().hidden_size * built.dtype.itemsize
    return {
        "the embeddings are computed": {
            "embeddings and one block": embeddings + block,
            "hidden states of a batch": one.capturing,
        },
        "a block is read": {"one block": block, "a tensor in its file": stored},
        "a block is run": {"one block": block, "hidden states and activations": hidden + running.peak},
        "the head is read": {"embeddings, norm and head": outside, "a tensor in its file": stored},
        "the head is run": {"embeddings, norm and head": outside, "hidden states and logits": 2 * hidden + head},
    }


def _outside(model: nn.Module, blocks: Iterable[nn.Module]) -> Iterable[nn.Parameter]:
    """The parameters outside of the blocks, tied ones once."""
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    return (parameter for parameter in model.parameters() if id(parameter) not in inside)


def _head_bytes(one: TracedBlock, rows: int) -> int:
    """Bytes of some tokens' logits and losses."""
    with LiveBytes() as live:
        logits = one.logits(rows)[0]
        losses_of(logits, torch.zeros(rows, dtype=torch.int64, device=logits.device))
    return live.peak
