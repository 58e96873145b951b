"""Predict the memory that pruning takes: one block, its statistics, and one batch of hidden states.

The passes over a block are traced on fake tensors, which computes nothing; the rest is sizes from the files' headers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spp.checkpoints.checkpoint import Checkpoint
from spp.checkpoints.hub import resolve_model
from spp.models.architecture import Matrix, decoder_blocks, prunable_matrices
from spp.models.blockwise.block_calls import batched
from spp.models.blockwise.traced import heaviest_block, nbytes, traced
from spp.models.completeness import require_whole
from spp.models.loading import context_window, skeleton
from spp.pruning.calibration.input_hooks import collect_statistics
from spp.pruning.engine import matrices_to_prune
from spp.pruning.options import PruneOptions
from spp.pruning.prune_block import BlockPruner
from spp.pruning.steps import steps_of
from spp.runtime.devices import compute_dtype, pick_device
from spp.runtime.memory_estimate import MemoryPrediction, available_bytes, libraries
from spp.runtime.tensor_memory import LiveBytes

# Adam's two moments, an fp32 copy, its gradient, and the weight that is computed with.
_TUNED_BYTES = 20


@dataclass(frozen=True, kw_only=True)
class PruningPrediction(MemoryPrediction):
    """The predicted memory of a pruning run, in the phase that takes most.

    Attributes:
        phase: the phase that takes most.
        blocks: number of blocks; the peak does not depend on it.
        disk_bytes: size of the result.
        states_bytes: size of the hidden states, which are on disk during the run.
    """

    phase: str
    blocks: int
    disk_bytes: int
    states_bytes: int


def predict_pruning(options: PruneOptions) -> PruningPrediction:
    """What `spp prune` with these options would need; it reads headers only, and writes nothing.

    Raises:
        UsageError: as `prune`, for what can be wrong with the request.
        SppError: a damaged model.
    """
    source = Checkpoint.open(resolve_model(options.model, code=options.trust_remote_code))
    source.require_unquantized("give the model as it was before quantization")
    device = pick_device(options.device)
    model = skeleton(source.folder, options, compute_dtype(options.dtype, device))
    require_whole(model, source)
    pruner = BlockPruner(options, matrices_to_prune(model, options)[0])
    prefix, blocks = decoder_blocks(model)
    heaviest = heaviest_block(model)
    block = nbytes(blocks[heaviest].parameters())
    matrices = prunable_matrices(f"{prefix}.{heaviest}", blocks[heaviest])
    layouts = source.layouts
    largest = max(layout.nbytes for layout in layouts.values())
    criterion = _scratch_of_criterion(options, matrices, device)
    phases = {"what is not pruned is copied": {"reading and writing": 2 * largest}}
    states = 0
    if pruner.calibrates:
        window = context_window(model.config, options.window)
        hidden = options.samples * window * model.config.get_text_config().hidden_size * model.dtype.itemsize
        states = hidden * (4 if options.reconstruct else 2)
        traced = _Traced(options, model, pruner, heaviest, window, device)
        phases["the embeddings are computed"] = {"embeddings and one block": block + traced.outside, **traced.capture}
        phases["a block is calibrated"] = {"one block": block, **traced.calibration}
        phases["a block is pruned"] = {"one block": block, "statistics": traced.statistics, "criterion": criterion}
        if options.reconstruct:
            phases["a block is reconstructed"] = {"one block": block, **traced.reconstruction}
    else:
        phases["a block is pruned"] = {"one block": block, "criterion": criterion}
    phase, parts = max(phases.items(), key=lambda item: sum(item[1].values()))
    return PruningPrediction(
        parts={**libraries("spp.pruning.prune", device), **parts},
        phase=phase,
        available=available_bytes(device),
        device=str(device),
        blocks=len(blocks),
        disk_bytes=sum(layout.nbytes for layout in layouts.values()),
        states_bytes=states,
    )


def _scratch_of_criterion(options: PruneOptions, matrices: Sequence[Matrix], device: torch.device) -> int:
    """Most bytes that choosing the weights of one matrix takes."""
    steps = steps_of(options)
    return max(steps.scratch_bytes(*matrix.weight.shape, on_gpu=device.type != "cpu") for matrix in matrices)


class _Traced:
    """The memory of passes over the model, traced on fake tensors.

    Attributes:
        outside: bytes of the embeddings.
        capture: bytes for computing them, by part.
        calibration: bytes of the pass that collects the statistics, by part.
        statistics: bytes of the statistics afterwards.
        reconstruction: bytes for tuning a block, by part; empty without reconstruction.
    """

    def __init__(
        self,
        options: PruneOptions,
        model: PreTrainedModel,
        pruner: BlockPruner,
        index: int,
        window: int,
        device: torch.device,
    ) -> None:
        prefix, blocks = decoder_blocks(model)
        self.outside = nbytes(model.get_input_embeddings().parameters())
        experts = [one for one in prunable_matrices(f"{prefix}.{index}", blocks[index]) if one.expert is not None]
        of_experts = sum(pruner.statistic_bytes(matrix) for matrix in experts)
        shape = batched(torch.zeros(options.samples, window, dtype=torch.int64))[0].shape
        with traced(model, index, shape, device) as one:
            self.capture = {"hidden states of a batch": one.capturing}
            linears = [
                matrix for matrix in pruner.matrices(f"{prefix}.{one.index}", one.block) if matrix.expert is None
            ]
            with torch.no_grad(), LiveBytes() as live:
                kept = collect_statistics(linears, pruner.kinds, one.run)
            self.calibration = {"statistics and activations": live.peak + of_experts}
            self.statistics = live.now + of_experts
            del kept
            self.reconstruction = _reconstruction(linears, one.run) if options.reconstruct else {}


def _reconstruction(matrices: Sequence[Matrix], run: Callable[[], Tensor]) -> dict[str, int]:
    """Bytes by part of a step that tunes these matrices."""
    for matrix in matrices:
        matrix.owner.get_parameter(matrix.parameter).requires_grad_()
    with LiveBytes() as live:
        run().square().sum().backward()
    tuned = sum(matrix.weight.numel() for matrix in matrices)
    return {"activations and gradients": live.peak, "tuned weights and optimizer": _TUNED_BYTES * tuned}
