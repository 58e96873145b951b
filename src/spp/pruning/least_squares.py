"""Least squares: the best values for the weights in a mask, row by row.

A row w that may keep the columns S gets the v with zeros elsewhere that minimizes (w - v) H (w - v)^T, H = 2/T X^T X
plus SparseGPT's damping, 0.01 times its mean diagonal:

    H_SS v_S = (H w)_S.

Rows are solved together, as many as fit the memory, each by a Cholesky factor: O K^3 / 3 products in all, for K kept
columns. ADMM's update comes close to it in twenty products O I^2.

Shapes: O output features, I input features, B rows of a batch, K kept columns of the row that has most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spp.errors import SppError
from spp.pruning.calibration.input_statistics import full_fp32
from spp.pruning.criteria.result import Pruned, survivors

_DAMPING = 0.01
# Entries of the systems (B, K, K) of a batch, unless a single one has more.
_ENTRIES, _GPU_ENTRIES = 2**22, 2**27
_FP32, _FP64 = 4, 8


def damped(hessian: Tensor) -> Tensor:
    """H (I, I) with its damping, and 1 for inputs that were zero in all of the calibration; H stays as it is."""
    work = hessian.clone()
    diagonal = work.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += _DAMPING * diagonal.mean()
    return work


def update(weight: Tensor, mask: Tensor, hessian: Tensor) -> Pruned:
    """The weights in the mask, with the values that are best for the layer's outputs.

    Args:
        weight: (O, I), before pruning, any float dtype.
        mask: (O, I) bool.
        hessian: (I, I) fp32, from `damped`.

    Returns:
        The weight in fp32.

    Raises:
        SppError: a system has no Cholesky factor, in float64 either.
    """
    found = torch.zeros_like(weight, dtype=torch.float32)
    most = int(mask.sum(dim=1).max()) if len(mask) else 0
    size = max(_entries(weight.is_cuda) // max(most, 1) ** 2, 1)
    for rows, kept, out in zip(weight.split(size), mask.split(size), found.split(size), strict=True):
        # Kept columns first; rows with fewer are filled up with columns whose equation is v = 0.
        columns = kept.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
        absent = ~kept.gather(1, columns)
        system = hessian[columns[:, :, None], columns[:, None, :]]
        system.masked_fill_(absent[:, :, None] | absent[:, None, :], 0)
        system.diagonal(dim1=1, dim2=2).masked_fill_(absent, 1)
        with full_fp32():
            side = (rows.float() @ hessian).gather(1, columns).masked_fill_(absent, 0)
            out.scatter_(1, columns, _solved(system, side))
    return survivors(found, mask)


def scratch_bytes(columns: int, *, on_gpu: bool) -> int:
    """Most bytes that the systems of a batch and their factors take."""
    return 2 * _FP32 * max(_entries(on_gpu), columns**2)


def _entries(on_gpu: bool) -> int:
    return _GPU_ENTRIES if on_gpu else _ENTRIES


def _solved(system: Tensor, side: Tensor) -> Tensor:
    """The solutions (B, K) of systems (B, K, K) with right-hand sides (B, K); in float64 where fp32 has no factor."""
    factor, failed = torch.linalg.cholesky_ex(system)
    solution = torch.cholesky_solve(side[:, :, None], factor)[:, :, 0]
    for row in failed.nonzero()[:, 0].tolist():
        exact, still = torch.linalg.cholesky_ex(system[row].double())
        if still:
            raise SppError(
                "least squares has no solution, for the calibration's inputs depend on each other; calibrate with more "
                "samples, or use the update admm"
            )
        solution[row] = torch.cholesky_solve(side[row, :, None].double(), exact)[:, 0]
    return solution
