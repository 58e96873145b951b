"""Prune the matrices of one block: take statistics of their inputs, choose, refine, update, reconstruct."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from spp.errors import SppError, raise_problems
from spp.models.architecture import Matrix, prunable_matrices
from spp.models.blockwise.walk import Runs
from spp.models.bypassed import computes_otherwise, read_directly
from spp.ops.dtypes import dtype_name
from spp.ops.zeros import all_finite
from spp.patterns import Pattern, Unstructured
from spp.pruning.calibration.input_hooks import Statistics, collect_statistics
from spp.pruning.calibration.input_statistics import Statistic
from spp.pruning.criteria.result import Pruned, survivors
from spp.pruning.options import BlockPart, Criterion, PruningSettings
from spp.pruning.reconstruction import Fit, Reconstruction, Targets, reconstruct
from spp.pruning.steps import CRITERIA, steps_of
from spp.runtime import distributed

logger = logging.getLogger("spp")


@dataclass(frozen=True, kw_only=True)
class MatrixResult:
    """The result of pruning a matrix.

    Attributes:
        criterion: the criterion that was used; None if nothing was pruned.
        tokens: calibration tokens that reached it; None without calibration.
        expert: whether it belongs to an expert.
    """

    name: str
    criterion: Criterion | None
    tokens: int | None
    expert: bool


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """The result of pruning a block.

    Attributes:
        name: name of the block.
        matrices: results of the pruned matrices, in order.
        fits: reconstructed part -> its errors before and after.
        left: matrices that stay as they were, because calibration does not see what they are multiplied with -> why.
    """

    name: str
    matrices: list[MatrixResult]
    fits: dict[BlockPart, Fit]
    left: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> BlockResult:
        """From what `dataclasses.asdict` made of it, and JSON."""
        matrices = [MatrixResult(**matrix) for matrix in values["matrices"]]
        fits: dict[BlockPart, Fit] = {part: Fit(**fit) for part, fit in values["fits"].items()}
        return cls(name=values["name"], matrices=matrices, fits=fits, left=values.get("left", {}))


class BlockPruner:
    """Prunes blocks as the settings say.

    Args:
        settings: what to remove, and how.
        names: names of the matrices to prune.
        seed: seed of reconstruction.

    Raises:
        UsageError: see `steps_of`.

    Attributes:
        pattern: the default pattern.
        kinds: kinds of statistics that it needs.
    """

    def __init__(self, settings: PruningSettings, names: Set[str], seed: int = 0) -> None:
        self.pattern = settings.pattern
        self._settings, self._names, self._seed = settings, names, seed
        self._steps = steps_of(settings)
        self.kinds: list[type[Statistic]] = [] if settings.keep_zeros else self._steps.statistics

    @property
    def calibrates(self) -> bool:
        """Whether blocks are run on calibration text."""
        settings = self._settings
        return bool(self.kinds or settings.reconstruct or settings.allocation == "owl")

    def statistic_bytes(self, matrix: Matrix) -> int:
        """Bytes of the statistics of a matrix's inputs, if it shares them with no other matrix."""
        return sum(kind(matrix.weight.shape[1]).nbytes for kind in self.kinds)

    def matrices(self, name: str, block: nn.Module) -> list[Matrix]:
        """Those of a block that are to be pruned."""
        return [matrix for matrix in prunable_matrices(name, block) if matrix.name in self._names]

    def prune(
        self, name: str, block: nn.Module, pattern: Pattern, runs: Runs, targets: Targets, *, reached: bool = True
    ) -> BlockResult:
        """Prune a block in place.

        Args:
            name: of the block.
            block: with its weights.
            pattern: what to keep.
            runs: this process's share of the calibration; empty where there is none.
            targets: the target outputs of the block for each batch, for reconstruction.
            reached: whether the model calls the block on text.

        Raises:
            SppError: see `spp.pruning.in_memory.prune_model`.
        """
        matrices = self.matrices(name, block)
        _check_weights(matrices)
        statistics: dict[str, Statistics] = {}
        if self.kinds and reached:
            statistics = collect_statistics(matrices, self.kinds, partial(run_all, runs, block))
            all_reduce_statistics(statistics)
        left = _without_inputs(block, matrices, statistics) if self.kinds else {}
        matrices = [matrix for matrix in matrices if matrix.name not in left]
        results = self._share_out(matrices, statistics, pattern)
        fits = self._reconstruct(name, block, matrices, runs, targets) if reached else {}
        return BlockResult(name=name, matrices=results, fits=fits, left=left)

    def _reconstruct(
        self, name: str, block: nn.Module, matrices: list[Matrix], runs: Runs, targets: Targets
    ) -> dict[BlockPart, Fit]:
        settings = self._settings
        if settings.reconstruct is None:
            return {}
        how = Reconstruction(
            parts=settings.reconstructed_parts,
            parameters=settings.reconstruct_params,
            epochs=settings.reconstruct_epochs,
            learning_rate=settings.reconstruct_learning_rate,
            r=settings.reconstruct_r,
            directions=settings.reconstruct_directions,
            scale=settings.reconstruct_scale,
            start=settings.reconstruct_start,
            seed=self._seed,
        )
        return reconstruct(name, block, lambda one, batch: runs[batch](one), targets, list(runs), matrices, how)

    def _share_out(
        self, matrices: list[Matrix], statistics: Mapping[str, Statistics], pattern: Pattern
    ) -> list[MatrixResult]:
        """Prune the matrices, divided among the processes; afterwards, all processes have all of them."""
        processes_ = distributed.world_size()
        mine = {
            index: self._prune_matrix(matrix, statistics.get(matrix.name, {}), pattern)
            for index, matrix in enumerate(matrices)
            if index % processes_ == distributed.rank()
        }
        for index, matrix in enumerate(matrices):
            distributed.broadcast(matrix.weight, index % processes_)
        everyones = {index: result for part in distributed.all_gather(mine) for index, result in part.items()}
        return [everyones[index] for index in range(len(matrices))]

    def _prune_matrix(self, matrix: Matrix, statistics: Statistics, pattern: Pattern) -> MatrixResult:
        """Prune one matrix in place."""
        settings = self._settings
        tokens = next((statistic.tokens for statistic in statistics.values()), None)
        criterion: Criterion | None = settings.criterion
        if settings.equal_rows and isinstance(pattern, Unstructured):
            pattern = pattern.rounded_down(matrix.weight.shape[1])
        if settings.keep_zeros:
            criterion, pruned = None, survivors(matrix.weight, torch.ones_like(matrix.weight, dtype=torch.bool))
        elif matrix.expert is not None and tokens is not None and tokens < max(settings.min_expert_tokens, 1):
            criterion = "magnitude"
            pruned = CRITERIA[criterion].prune(matrix.weight, None, pattern)
        else:
            pruned = self._chosen(matrix, statistics, pattern)
        _put(matrix, pruned)
        return MatrixResult(name=matrix.name, criterion=criterion, tokens=tokens, expert=matrix.expert is not None)

    def _chosen(self, matrix: Matrix, statistics: Statistics, pattern: Pattern) -> Pruned:
        """What the steps make of a matrix."""
        for statistic in statistics.values():
            check_statistic(matrix.name, statistic)
        try:
            pruned = self._steps.run(matrix.weight, statistics, pattern)
        except SppError as error:
            raise type(error)(f"{matrix.name}: {error}") from error
        if pruned.note:
            logger.warning("%s: %s", matrix.name, pruned.note)
        return pruned


def run_all(runs: Runs, block: nn.Module) -> None:
    """Run a block over the calibration, for the statistics that hooks collect; outputs are discarded."""
    for run in runs.values():
        run(block)


def all_reduce_statistics(statistics: Mapping[str, Statistics]) -> None:
    """Add up the statistics of all processes; a shared statistic is added once."""
    distinct = {id(one): one for kinds in statistics.values() for one in kinds.values()}
    for statistic in distinct.values():
        statistic.all_reduce()


def _without_inputs(
    block: nn.Module, matrices: Sequence[Matrix], statistics: Mapping[str, Statistics]
) -> dict[str, str]:
    """Name of each matrix whose inputs calibration does not see, however long it is -> why."""
    if not statistics:
        return {matrix.name: "the model does not call its block on text" for matrix in matrices}
    left: dict[str, str] = {}
    read = read_directly(block)
    for matrix in matrices:
        tokens = max(statistic.tokens for statistic in statistics[matrix.name].values())
        if computes_otherwise(matrix.owner):
            left[matrix.name] = f"its class, {type(matrix.owner).__name__}, has a forward of its own"
        elif matrix.owner in read and not tokens:
            left[matrix.name] = "the model reads its weight without calling it"
    return left


def _check_weights(matrices: list[Matrix]) -> None:
    bad = [matrix.name for matrix in matrices if not all_finite(matrix.weight)]
    raise_problems([f"{name}: the weight holds NaN or infinity; the model is damaged" for name in bad], SppError)


def check_statistic(name: str, statistic: Statistic) -> None:
    """Check a statistic of a layer's inputs.

    Raises:
        SppError: it has seen no token, or NaN or infinity.
    """
    if not statistic.tokens:
        raise SppError(f"{name}: no calibration token reached this layer; calibrate with more samples")
    if not statistic.is_finite():
        raise SppError(
            f"{name}: its calibration inputs hold NaN or infinity; compute in float32 or bfloat16 (--dtype), or "
            "check the model"
        )


def _put(matrix: Matrix, pruned: Pruned) -> None:
    """Write a pruned weight into its place, rounded to the dtype there."""
    weight = matrix.weight.copy_(pruned.weight)
    weight.masked_fill_(weight == 0, 0)  # a tiny negative survivor may have been rounded to -0.0
    if not all_finite(weight):
        dtype = dtype_name(weight.dtype)
        raise SppError(
            f"{matrix.name}: an updated weight is NaN, or too large for {dtype}; compute in float32 (--dtype)"
        )
