"""Prune a model that is loaded in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from spp.models.architecture import decoder_blocks
from spp.models.blockwise.hidden_states import States
from spp.models.blockwise.journal import Journal
from spp.pruning.engine import prune_blocks
from spp.pruning.options import PruningSettings
from spp.pruning.prune_block import BlockResult


class LoadedBlocks:
    """Those of a model that is in memory as a whole."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device = model, model.device
        self.untouched: set[str] = set()
        self._blocks = decoder_blocks(model)[1]

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        yield

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        yield self._blocks[index]

    def keep(self, index: int) -> None:
        pass


def prune_model(
    model: PreTrainedModel, settings: PruningSettings, windows: Tensor | None = None, *, seed: int = 0
) -> list[BlockResult]:
    """Prune every matrix inside the decoder blocks of `model`, in place; puts it in eval mode.

    Args:
        model: a decoder-only causal LM in any float dtype; scores and statistics are fp32.
        settings: what to remove, and how.
        windows: (samples, window) int64 token ids to calibrate on; not needed for magnitude.
        seed: seed of reconstruction.

    Returns:
        The result of each block.

    Raises:
        UsageError: the pattern does not fit (it names all matrices concerned, and nothing is changed), calibration
            windows are missing, or the model is not a decoder-only causal LM.
        SppError: NaN or infinity in weights or activations, no calibration input for a layer, or a Hessian that
            cannot be inverted; names the layer. The model is not to be used any more.
    """
    return prune_blocks(LoadedBlocks(model.eval()), settings, windows, MemoryJournal(), seed=seed)


class MemoryJournal(Journal):
    """A journal in memory, for runs that need not be resumed."""

    def __init__(self) -> None:
        self._results: dict[str, list[Any]] = {}
        self._states: dict[tuple[str, int], dict[str, dict[int, Any]]] = {}

    def results(self, walk: str) -> list[Any]:
        return self._results.setdefault(walk, [])

    def states(self, walk: str, block: int, stream: str = "main") -> States:
        return self._states.setdefault((walk, block), {}).setdefault(stream, {})

    def finish(self, walk: str, result: Any) -> None:
        self._states.pop((walk, len(self.results(walk))), None)
        self._results[walk].append(result)
