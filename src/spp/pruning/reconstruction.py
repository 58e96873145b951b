"""Block reconstruction: tune the remaining weights of a pruned block towards the outputs of the dense block.

With x the hidden states that enter the block in the pruned model, x' those in the dense model, and theta the surviving
weights (or the A and B of SPP):

    minimize over theta   sum over calibration batches of ||block(x; theta) - block(x'; dense)||^2

(after arXiv 2510.14444, which fits attention and MLP one by one, each to the dense one on the same inputs). The targets
are the inputs of the next block in the dense model, so a block also corrects the blocks before it. Zeros stay +0.0.

Memory besides the block and both streams of hidden states: the activations of one batch in the block, and for each
tuned weight its value in the dtype to compute in and, in fp32, a copy, its gradient and Adam's two moments. With SPP,
the fp32 tensors are those of A and B only, but a few fp32 tensors of the weights' size live from forward to backward.

Shapes: O output features, I input features, R row groups, K directions.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from spp.errors import SppError
from spp.models.architecture import Matrix, is_transposed
from spp.ops.reference import fitting_groups, merged_weight, one_direction_each
from spp.ops.zero_proof import lost_zeros
from spp.ops.zeros import canonical_zeros
from spp.pruning.options import BlockPart

Run = Callable[[Callable[..., Any], int], Tensor]
"""(block or a function in its place, batch) -> its output for its input states in the pruned model."""
Targets = Callable[[int], Tensor]
"""batch -> the target output of the block, on the same device."""
Weights = Mapping[str, Tensor]
"""Name of a parameter in the block -> its value."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What to tune, and how.

    By default A and B have the shape, scale and start of the published SPP, whatever the adapter of a later training
    run has: they are merged here, and the learning rate was chosen for them.

    Attributes:
        parts: what is tuned at once, one after the other: all of the block; or its attention, or its MLP, in less
            memory. Each is tuned for the output of the whole block.
        parameters: "weights" tunes every surviving weight; "spp" the A and B of W' = W + s * W * (A[g] B), which is
            merged at the end.
        epochs: passes over the calibration batches, with a step of Adam on each batch.
        learning_rate: of the first step; it falls linearly to 0. For weights it is relative to the root mean square
            of a parameter's survivors, for A and B absolute. None takes the default of `parameters`.
        r: row groups R, at most a matrix's output features (spp).
        directions: K rows of A for each row group (spp).
        scale: s (spp).
        start: "published" draws A and sets B to 0; "ones" sets A to 0 and each row of B to a single 1 (spp).
        seed: of A's initial values (spp).
    """

    parts: tuple[BlockPart, ...] = ("block",)
    parameters: Literal["weights", "spp"] = "weights"
    epochs: int = 8
    learning_rate: float | None = None
    r: int = 16
    directions: int = 1
    scale: float = 2.0
    start: Literal["published", "ones"] = "published"
    seed: int = 0

    @property
    def first_rate(self) -> float:
        """The learning rate of the first step."""
        return self.learning_rate or LEARNING_RATES[self.parameters]


LEARNING_RATES = {"weights": 0.05, "spp": 0.1}
"""Chosen on small models with 32 to 128 steps. Twice as high is better at 75 % and worse at 2:4; see LOG.md."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Squared error of the block's output over the squared norm of the targets, over all calibration batches.

    Attributes:
        before: before the part was tuned.
        after: afterwards; never above `before`.
    """

    before: float
    after: float


def reconstruct(
    name: str,
    block: nn.Module,
    run: Run,
    targets: Targets,
    batches: Sequence[int],
    matrices: Sequence[Matrix],
    settings: Reconstruction,
) -> dict[BlockPart, Fit]:
    """Tune the pruned matrices of a block in place; a part that does not improve is left unchanged.

    The same arguments give the same bits on a CPU.

    Args:
        name: the block's full name (`model.layers.0`).
        block: pruned, in eval mode, in any float dtype; weights are tuned in fp32 and rounded at the end.
        run: runs it, or a function in its place, on a calibration batch.
        targets: the target outputs: those of the dense model's block, for dense inputs.
        batches: numbers of the calibration batches, in the order of the steps.
        matrices: matrices of `block` to tune. SPP does not tune experts that are stored in one parameter.
        settings: what to tune, and how.

    Returns:
        Part -> its fit, for all parts that have something to tune.

    Raises:
        SppError: NaN or infinity in the error, or a lost zero; says where.
    """
    fits: dict[BlockPart, Fit] = {}
    for part in settings.parts:
        mine = [matrix for matrix in matrices if _belongs(matrix, name, part) and _is_tuned(matrix, settings)]
        if mine:
            tuned = _SppFactors(block, mine, settings) if settings.parameters == "spp" else _Survivors(block, mine)
            objective = _Objective(f"{name} ({part})", block, run, targets, batches)
            fits[part] = _tune(name, block, objective, tuned, settings)
    return fits


def _belongs(matrix: Matrix, block: str, part: BlockPart) -> bool:
    """Whether a matrix is in a part, by the name of the block's child that holds it."""
    child = matrix.name.removeprefix(f"{block}.").split(".")[0]
    return part == "block" or ("attn" in child or "attention" in child) == (part == "attention")


def _is_tuned(matrix: Matrix, settings: Reconstruction) -> bool:
    return settings.parameters == "weights" or matrix.expert is None


class _Objective:
    """The block's distance to the targets, with some of its parameters replaced.

    Args:
        title: what is tuned, for errors.
        block, run, targets, batches: as for `reconstruct`.
    """

    def __init__(self, title: str, block: nn.Module, run: Run, targets: Targets, batches: Sequence[int]) -> None:
        self._title, self._block, self._run, self._targets = title, block, run, targets
        self.batches = batches
        sizes = [(float(target.float().square().sum()), target.numel()) for target in map(targets, batches)]
        # Targets of nothing but zeros make the error an absolute one.
        self._norm = sum(norm for norm, _ in sizes) or 1.0
        self._entries = sum(entries for _, entries in sizes)

    def loss(self, weights: Weights, batch: int) -> Tensor:
        """Squared error of a batch over the targets' mean square, a scalar.

        This scale keeps gradients within fp16's range, and far above Adam's epsilon.
        """
        return self._squared_error(weights, batch) * (self._entries / self._norm)

    @torch.no_grad()
    def error(self, weights: Weights) -> float:
        """Squared error over squared norm of the targets, over all batches."""
        return sum(float(self._squared_error(weights, batch)) for batch in self.batches) / self._norm

    def _squared_error(self, weights: Weights, batch: int) -> Tensor:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self._block, dict(weights), args, kwargs)

        error = (self._run(forward, batch).float() - self._targets(batch).float()).square().sum()
        if not torch.isfinite(error):
            cause = "lower --reconstruct-learning-rate" if weights else "check the model and the calibration data"
            raise SppError(f"{self._title}: the error to be reconstructed is NaN or infinite; {cause}")
        return error


class _Tuned(Protocol):
    """The tuned tensors, and the weights that they determine."""

    def rates(self) -> Iterable[tuple[Tensor, float]]:
        """Every tensor that is tuned, fp32, and what to multiply the learning rate by for it."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The block's parameters, differentiable, in their own dtype; 0 where they are 0 in the block."""
        ...


class _Survivors:
    """All weights that are not zero.

    Args:
        block: holds the parameters.
        matrices: which; experts in one parameter are tuned together.
    """

    def __init__(self, block: nn.Module, matrices: Sequence[Matrix]) -> None:
        names = _parameter_names(block, matrices)
        self._before = {name: block.get_parameter(name).detach() for name in names}
        self._now = {name: weight.float().clone().requires_grad_() for name, weight in self._before.items()}

    def rates(self) -> Iterable[tuple[Tensor, float]]:
        """Each parameter, and the root mean square of its survivors."""
        return [(weight, _root_mean_square(weight.detach())) for weight in self._now.values()]

    def weights(self) -> dict[str, Tensor]:
        """The survivors, rounded, between zeros; these have no gradient, so that nothing can move them."""
        return {
            name: torch.where(before == 0, 0.0, self._now[name]).to(before.dtype)
            for name, before in self._before.items()
        }


class _SppFactors:
    """A (R K, I) and B (O, K) of every matrix.

    Args:
        block: holds the parameters.
        matrices: linear layers' only.
        settings: r, directions, scale and seed.
    """

    def __init__(self, block: nn.Module, matrices: Sequence[Matrix], settings: Reconstruction) -> None:
        self._matrices = dict(zip(_parameter_names(block, matrices), matrices, strict=True))
        self._factors = {name: _start(matrix, settings) for name, matrix in self._matrices.items()}
        self._scale = settings.scale

    def rates(self) -> Iterable[tuple[Tensor, float]]:
        """The factors."""
        return [(factor, 1.0) for factors in self._factors.values() for factor in factors]

    def weights(self) -> dict[str, Tensor]:
        """W' = W + s * W * (A[g] B), rounded once."""
        return {name: self._merged(matrix, *self._factors[name]) for name, matrix in self._matrices.items()}

    def _merged(self, matrix: Matrix, A: Tensor, B: Tensor) -> Tensor:
        """W' in the layout of the layer, which may be (I, O)."""
        weight = merged_weight(matrix.weight, A, B, self._scale)
        return weight.T if is_transposed(matrix.owner) else weight


def _parameter_names(block: nn.Module, matrices: Sequence[Matrix]) -> list[str]:
    """Names in the block of the parameters that hold the matrices, each of them once."""
    owners = {module: name for name, module in block.named_modules()}
    return list(dict.fromkeys(f"{owners[matrix.owner]}.{matrix.parameter}" for matrix in matrices))


def _root_mean_square(weight: Tensor) -> float:
    """Of the entries that are not zero; 0 where all are."""
    return math.sqrt(float(weight.square().sum()) / max(int(weight.count_nonzero()), 1))


def _start(matrix: Matrix, settings: Reconstruction) -> tuple[Tensor, Tensor]:
    """A and B, fp32, so that W' = W: A ~ U(-1/sqrt(I), 1/sqrt(I)) and B = 0, or A = 0 and a single 1 per row of B.

    A depends on the seed, the matrix's name and its shape alone.
    """
    out_features, in_features = matrix.weight.shape
    groups, directions = fitting_groups(out_features, settings.r, settings.directions)
    chance = torch.Generator().manual_seed(zlib.crc32(f"{settings.seed} {matrix.name}".encode()))
    bound = 1 / math.sqrt(in_features)
    A = torch.empty(groups * directions, in_features).uniform_(-bound, bound, generator=chance)
    B = torch.zeros(out_features, directions)
    if settings.start == "ones":
        A, B = torch.zeros_like(A), one_direction_each(out_features, groups, directions).float()
    device = matrix.weight.device
    return A.to(device).requires_grad_(), B.to(device).requires_grad_()


def _tune(name: str, block: nn.Module, objective: _Objective, tuned: _Tuned, settings: Reconstruction) -> Fit:
    """Tune, and write the weights into the block if they are better than before."""
    before = objective.error({})
    if not before:
        return Fit(before=0.0, after=0.0)
    _minimize(objective, tuned, settings)
    with torch.no_grad():
        weights = {parameter: canonical_zeros(weight) for parameter, weight in tuned.weights().items()}
    _require_zeros(name, block, weights)
    after = objective.error(weights)
    if after >= before:
        return Fit(before=before, after=before)
    for parameter, weight in weights.items():
        block.get_parameter(parameter).data.copy_(weight)
    return Fit(before=before, after=after)


def _minimize(objective: _Objective, tuned: _Tuned, settings: Reconstruction) -> None:
    """Adam with one step per batch; the learning rate falls linearly, to 0 after the last step."""
    groups = [{"params": [tensor], "lr": settings.first_rate * factor} for tensor, factor in tuned.rates()]
    tensors = [tensor for tensor, _ in tuned.rates()]
    optimizer = Adam(groups)
    steps = settings.epochs * len(objective.batches)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
    for batch in [*objective.batches] * settings.epochs:
        with torch.enable_grad():
            loss = objective.loss(tuned.weights(), batch)
            # Not backward(): the block's own parameters need no gradients. An expert may see no token of a batch.
            gradients = torch.autograd.grad(loss, tensors, materialize_grads=True)
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
        schedule.step()


def _require_zeros(name: str, block: nn.Module, weights: Weights) -> None:
    """Raise an SppError where a zero of the block is anything but +0.0 in the new weights."""
    for parameter, weight in weights.items():
        if lost := lost_zeros(block.get_parameter(parameter).detach(), weight):
            raise SppError(f"{name}.{parameter}: reconstruction would turn {lost} zeros into something else")
