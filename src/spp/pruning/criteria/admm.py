"""ADMM (arXiv 2401.02938): choose a mask and the values of the survivors together, by alternating between them.

With the layer's H = 2/T X^T X, N = diag(H)^1/2 and w' = w N, it minimizes the error of the outputs,
(w' - z) N^-1 H N^-1 (w' - z)^T, over rows z that have zeros where the mask says so. With G = N^-1 H N^-1 + 0.1, for
N^-1 H N^-1 has a diagonal of 1, and a penalty rho = 1, each of 20 steps is

    Z = mask * (V + U),    U = U + V - Z,    V = W' + (Z - U - W') rho (G + rho)^-1,

where the last is the paper's (W' G + rho (Z - U)) (G + rho)^-1, written so that G is not needed. In the first 15 steps
the mask removes the weights of least |V + U|, on a cubic schedule: s_t = s (1 - (1 - t/15)^3). Then it is fixed. All of
a step is one product of matrices and a choice.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spp.patterns import NM, Pattern, Unstructured
from spp.pruning.calibration.input_statistics import full_fp32
from spp.pruning.criteria.result import Pruned, survivors

_STEPS = 20
_CHOOSING = 15
_DAMPING = 0.1
_RHO = 1.0


@dataclass(frozen=True)
class Scaled:
    """What ADMM needs of a layer's inputs.

    Attributes:
        norms: (I,) fp32, N; 1 for an input that was zero in all of the calibration.
        dead: (I,) bool, inputs that were zero in all of the calibration.
        inverse: (I, I) fp32, rho (N^-1 H N^-1 + 0.1 + rho)^-1.
    """

    norms: Tensor
    dead: Tensor
    inverse: Tensor


def scaled_inverse(hessian: Tensor) -> Scaled:
    """Scale, damp and invert a Hessian (I, I), fp32, which stays as it is."""
    dead = hessian.diagonal() == 0
    norms = hessian.diagonal().sqrt().masked_fill(dead, 1)
    work = (hessian / norms).div_(norms[:, None])
    work.diagonal().add_(_DAMPING * work.diagonal().mean() + _RHO)
    with full_fp32():
        torch.linalg.cholesky(work, out=work)  # never fails: no eigenvalue is below rho
        return Scaled(norms, dead, torch.cholesky_inverse(work).mul_(_RHO))


def prune(weight: Tensor, scaled: Scaled, pattern: Pattern) -> Pruned:
    """Choose a mask and the survivors' values, all in fp32.

    Unstructured: compared over the whole matrix. Weights that are zero already stay zero. Weights of dead inputs are
    removed.

    Args:
        weight: (O, I), any float dtype.
        scaled: of the layer's Hessian.
        pattern: how many weights to remove.

    Returns:
        The weight in fp32. Beside it and its mask, the scratch is four fp32 copies of the weight.
    """
    ratios = [1 - (1 - step / _CHOOSING) ** 3 for step in range(1, _CHOOSING)]
    patterns = [at_ratio(pattern, ratio) for ratio in ratios] + [pattern]

    def choose(sizes: Tensor, step: int, before: Tensor) -> Tensor:
        return _mask(sizes, patterns[step]) if step < _CHOOSING else before

    return _alternate(weight, scaled, choose, weight != 0)


def update(weight: Tensor, mask: Tensor, scaled: Scaled) -> Pruned:
    """New values of the weights in a mask, in fp32; the scratch is that of `prune`.

    Args:
        weight: (O, I), before pruning, any float dtype.
        mask: (O, I) bool.
        scaled: of the layer's Hessian.
    """
    return _alternate(weight, scaled, lambda _, __, before: before, mask)


def at_ratio(pattern: Pattern, ratio: float) -> Pattern:
    """What removes this share of what a pattern removes; N:M removes all of it at once."""
    return pattern if isinstance(pattern, NM) else Unstructured(pattern.sparsity * ratio)


def _mask(sizes: Tensor, pattern: Pattern) -> Tensor:
    if isinstance(pattern, NM):
        return pattern.keep_mask(sizes)
    return pattern.keep_mask(sizes.view(1, -1)).view_as(sizes)


def _alternate(weight: Tensor, scaled: Scaled, choose: Callable[[Tensor, int, Tensor], Tensor], mask: Tensor) -> Pruned:
    """All steps.

    Args:
        weight: (O, I).
        scaled: of the layer's Hessian.
        choose: (|V + U|, or -inf for what must be zero; step from 0; mask before) -> mask.
        mask: (O, I) bool, the weights that may stay.
    """
    target = (weight.float() * scaled.norms).contiguous()  # those of Conv1D are transposed
    target[:, scaled.dead] = 0
    gone = (weight == 0) | scaled.dead
    v, u = target.clone(), torch.zeros_like(target)
    for step in range(_STEPS):
        u += v
        mask = choose(torch.abs(u, out=v).masked_fill_(gone, -torch.inf), step, mask) & ~gone
        v.copy_(u).masked_fill_(~mask, 0)  # Z
        u -= v
        if step < _STEPS - 1:
            with full_fp32():
                v = torch.addmm(target, v.sub_(u).sub_(target), scaled.inverse)
    return survivors(v.div_(scaled.norms), mask)
