"""Prune a model block by block, each one calibrated on the pruned output of those before it.

Per block: one pass that feeds the statistics of all its matrices, the pruning, and one pass of the pruned block that
computes the inputs of the next. `Blocks` hides whether they are in memory or in files; `Journal` records progress.
Several processes divide the calibration windows and the matrices of a block among them; their statistics are added up,
so that all of them get the same blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Set
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spp.data.tokens import require_known_ids
from spp.errors import UsageError
from spp.models.architecture import Matrix, decoder_blocks, prunable_matrices
from spp.models.blockwise.block_calls import batched
from spp.models.blockwise.journal import Journal
from spp.models.blockwise.walk import BlocksToWalk, Walk
from spp.patterns import Unstructured
from spp.pruning.calibration.input_hooks import collect_statistics
from spp.pruning.calibration.input_statistics import InputNorm
from spp.pruning.options import PruningSettings
from spp.pruning.owl import outlier_share, owl_ratios
from spp.pruning.prune_block import BlockPruner, BlockResult, all_reduce_statistics
from spp.runtime import distributed

logger = logging.getLogger("spp")


class Blocks(BlocksToWalk, Protocol):
    """The decoder blocks of a model, of which as few as possible are in memory.

    Attributes:
        untouched: names of parameters that pruning turns out to leave as they are; it adds them before `keep`.
    """

    untouched: set[str]

    def keep(self, index: int) -> Any:
        """Store the changed weights of a loaded block; returns facts about them, as JSON values."""
        ...


def prune_blocks(
    blocks: Blocks, settings: PruningSettings, windows: Tensor | None, journal: Journal, *, seed: int = 0
) -> list[BlockResult]:
    """Prune the blocks that are not finished according to the journal; see `prune_model`."""
    if settings.reconstruct and distributed.world_size() > 1:
        raise UsageError("reconstruction runs in one process; start it without torchrun, or leave out --reconstruct")
    pruner = BlockPruner(settings, matrices_to_prune(blocks.model, settings)[0], seed)
    batches: dict[int, Tensor] = {}
    if pruner.calibrates:
        batches = my_batches(windows, f"the criterion {settings.criterion}", blocks)
    with torch.no_grad():
        walk = Walk(blocks, batches, journal, calibrates=pruner.calibrates)
        ratios = _survey(walk, pruner, settings) if settings.allocation == "owl" else None
        walk.start("prune")
        for index in walk.unfinished("pruning"):
            pattern = Unstructured(ratios[index]) if ratios else pruner.pattern
            with blocks.loaded(index) as block:
                if settings.reconstruct:
                    walk.propagate(index, block, "dense")
                result = pruner.prune(
                    walk.name(index),
                    block,
                    pattern,
                    walk.runs(index),
                    walk.targets(index),
                    reached=walk.reaches(index),
                )
                if result.left:
                    blocks.untouched |= pruned_parameters(blocks.model, result.left.keys())
                kept = blocks.keep(index)
                if not walk.is_last(index):
                    walk.propagate(index, block)
            walk.finish({**asdict(result), "kept": kept})
    results = [BlockResult.of(block) for block in journal.results("prune")]
    left = {name: why for block in results for name, why in block.left.items()}
    if left and distributed.rank() == 0:
        name, why = next(iter(left.items()))
        logger.warning("%d matrices stay dense, e.g. %s: %s", len(left), name, why)
    return results


def needs_calibration(settings: PruningSettings) -> bool:
    """Whether pruning with these settings needs calibration."""
    return BlockPruner(settings, frozenset()).calibrates


def matrices_to_prune(model: PreTrainedModel, settings: PruningSettings) -> tuple[frozenset[str], list[str]]:
    """Names of the matrices that the pattern fits, and of those that it does not fit, which may be skipped.

    Raises:
        UsageError: some do not fit, and may not be skipped; or none fits.
    """
    pattern = settings.pattern
    sizes = {matrix.name: matrix.weight.shape[1] for matrix in _all_matrices(model)}
    skipped = [] if settings.keep_zeros else [name for name, columns in sizes.items() if not pattern.fits(columns)]
    if skipped and (not settings.skip_indivisible or len(skipped) == len(sizes)):
        remedy = (
            "choose another pattern, or pass --skip-indivisible to leave these layers dense"
            if len(skipped) < len(sizes)
            else "choose another pattern"
        )
        raise UsageError(
            f"pattern {pattern} does not divide the input dimension of {len(skipped)} of {len(sizes)} layers: "
            f"{', '.join(f'{name} ({sizes[name]})' for name in skipped)}; {remedy}"
        )
    return frozenset(sizes) - set(skipped), skipped


def pruned_parameters(model: PreTrainedModel, names: Set[str]) -> set[str]:
    """Full names of the parameters that hold these matrices."""
    owners = {id(module): name for name, module in model.named_modules()}
    return {f"{owners[id(one.owner)]}.{one.parameter}" for one in _all_matrices(model) if one.name in names}


def _all_matrices(model: PreTrainedModel) -> Iterator[Matrix]:
    """Those of all blocks, in order."""
    prefix, blocks = decoder_blocks(model)
    for index, block in enumerate(blocks):
        yield from prunable_matrices(f"{prefix}.{index}", block)


def my_batches(windows: Tensor | None, what: str, blocks: BlocksToWalk) -> dict[int, Tensor]:
    """This process's share of the calibration batches that something needs, by their number among all."""
    if windows is None or not windows.numel():
        raise UsageError(f"{what} needs calibration text")
    vocabulary = blocks.model.get_input_embeddings().get_parameter("weight").shape[0]
    require_known_ids(windows.tolist(), vocabulary, "calibration text")
    numbered = enumerate(batched(windows.to(blocks.device)))
    return {number: batch for number, batch in numbered if number % distributed.world_size() == distributed.rank()}


def _survey(walk: Walk, pruner: BlockPruner, settings: PruningSettings) -> list[float]:
    """OWL's sparsity of every block, from a pass over the dense blocks."""
    walk.start("survey")
    for index in walk.unfinished("looking for outliers"):
        with walk.source.loaded(index) as block:
            matrices = pruner.matrices(walk.name(index), block)
            seen = collect_statistics(matrices, [InputNorm], partial(walk.propagate, index, block))
            all_reduce_statistics(seen)
            norms = {name: statistics[InputNorm] for name, statistics in seen.items()}
            scored = [(one.weight, norms[one.name].value()) for one in matrices if norms[one.name].tokens]
            share = outlier_share(scored, settings.owl_threshold)
        walk.finish({"share": share, "size": sum(one.weight.numel() for one in matrices)})
    shares, sizes = ([block[key] for block in walk.results()] for key in ("share", "size"))
    return owl_ratios(shares, sizes, pruner.pattern.sparsity, settings.owl_limit)
