"""The decoder blocks of a model that stays in its files: each is read, pruned, and passed on to be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spp.checkpoints.checkpoint import Checkpoint
from spp.models.blockwise.streamed_blocks import StreamedBlocks
from spp.models.weight_map import Part

Keep = Callable[[dict[str, tuple[Part, Tensor]]], dict[str, Any]]
"""What to do with a finished block: name in the file -> which part of which parameter it is, and that part's values.

It returns facts of those that were pruned, by name.
"""


class PrunedBlocks(StreamedBlocks):
    """See `spp.pruning.engine.Blocks`.

    Args:
        model: as for `StreamedBlocks`, and so the next two.
        checkpoint: the files with the weights.
        device: device to compute on.
        keep: called with the tensors of a finished block; returns facts about them, as JSON values.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device, keep: Keep) -> None:
        super().__init__(model, checkpoint, device)
        self.untouched: set[str] = set()
        self._keep = keep

    def keep(self, index: int) -> dict[str, Any]:
        """Pass the tensors of a block to the function `keep`; the facts that it returns of those that were touched."""
        stored = self.stored(index)
        facts = self._keep(stored)
        return {name: fact for name, fact in facts.items() if stored[name][0].parameter not in self.untouched}
