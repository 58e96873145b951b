"""Full fine-tuning (`--method full`): train the values of a packed model, and write the model that comes of it.

The result has the files of the base with new values, and is written, and proved, as `spp merge` does it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spp.adapters.matching import Changes
from spp.adapters.merge import MergeReport, write_model
from spp.adapters.options import WritingOptions
from spp.checkpoints.checkpoint import Checkpoint
from spp.checkpoints.fingerprint import tensor_digests
from spp.errors import UsageError
from spp.models.experts import pruned_stacks
from spp.models.pack_model import packed_layer
from spp.models.packed_linear import PackedLinear
from spp.models.trainable_values import trainable_values
from spp.models.weight_map import Part
from spp.models.weight_names import weights_in_files
from spp.ops import unpack
from spp.ops.packed import PackedWeight
from spp.training.options import TrainOptions
from spp.training.sharding import whole

logger = logging.getLogger("spp")


def with_trained_values(model: PreTrainedModel, targets: dict[str, nn.Module]) -> PreTrainedModel:
    """Make the survivors of these layers trainable, in place; returns the model.

    A layer that is not packed, because it has few zeros, is packed all the same: they are zeros to keep.

    Args:
        model: the sparse model.
        targets: full module name -> linear layer; packed layers replace those that are not.
    """
    for name, layer in targets.items():
        if not isinstance(layer, PackedLinear):
            targets[name] = packed_layer(layer)
            model.set_submodule(name, targets[name])
    if left := list(pruned_stacks(model)):
        logger.warning("%d stacks of experts are not trained by --method full, e.g. %s", len(left), left[0])
    trainable_values(model, targets)
    model.config.use_cache = False  # as for adapters
    return model


def whole_layers(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, PackedWeight]:
    """Full module name -> the trained weight (O, I), on the CPU. If the model is sharded, all processes must call it.

    Args:
        model: in training.
        trained: name of every trained parameter -> its final values.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    return {
        name: PackedWeight(
            trained[f"{name}.values"].cpu(), whole(one.bitmask).cpu(), whole(one.row_offsets).cpu(), one.in_features
        )
        for name, one in layers.items()
        if f"{name}.values" in trained
    }


@dataclass(frozen=True)
class TrainedWeight:
    """What a tensor of the base becomes.

    Attributes:
        weight: the trained weight (O, I), of which it is a part.
        part: which part it is.
        transposed: whether the files hold it as (I, O).
    """

    weight: PackedWeight
    part: Part
    transposed: bool

    def merge(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The new tensor, laid out as the old one is, rounded once to `dtype`."""
        dense = unpack(self.weight, dtype)
        return self.part.view(dense.T if self.transposed else dense).contiguous()


def require_zeros(share_of_zeros: float, model: str) -> None:
    """Refuse a dense model.

    Raises:
        UsageError: the model has no zeros.
    """
    if share_of_zeros == 0:
        raise UsageError(
            f"{model} is dense: it has no zero that full fine-tuning could keep; prune it first (spp prune), or use "
            "transformers' Trainer"
        )


def write_trained_model(
    base: Checkpoint,
    layers: Mapping[str, PackedWeight],
    options: TrainOptions,
    training: Mapping[str, Any],
    *,
    folder: Path,
    work: Path,
) -> MergeReport:
    """Write the base with the trained weights, and the proof that every zero stayed.

    Args:
        base: the sparse model that was trained.
        layers: see `whole_layers`.
        options: of the run.
        training: for the manifest.
        folder: the new folder.
        work: the run's folder of checkpoints.

    Raises:
        SppError: the proof failed.
    """
    parts = weights_in_files(base).parts
    updates = {
        name: TrainedWeight(weight, part, base.transposed(name))
        for module, weight in layers.items()
        for name, part in parts[module].items()
    }
    # A model that trains has no use for its NaN, if it has some.
    values = {name: getattr(options, name) for name in ("model", "out", "rounding", "seed")}
    writing = WritingOptions.build({**values, "allow_nonfinite": True})
    origin = {"method": "full", "training": training}
    record = work / "writing"  # what a killed run wrote is written again: it may have been trained further since
    shutil.rmtree(record, ignore_errors=True)
    record.mkdir()
    return write_model(base, tensor_digests(base), Changes(updates), writing, origin, folder=folder, work=record)
