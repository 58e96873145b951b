"""Slow, literal implementations of the published formulas, written for comparison only."""

from __future__ import annotations

import torch
from torch import Tensor

from spp.patterns import NM, Pattern, Unstructured


def removed_positions(scores: list[float], pattern: Pattern) -> list[int]:
    """Positions of a row that go: the lowest scores of the row, or of each group; the earlier one of equal scores."""
    size, count = (pattern.m, pattern.m - pattern.n) if isinstance(pattern, NM) else (len(scores), None)
    removed = []
    for start in range(0, len(scores), size):
        group = sorted(range(start, start + size), key=lambda position: (scores[position], position))
        removed += group[: int(size * pattern.sparsity + 1e-9) if count is None else count]
    return removed


def mask_by_rows(scores: Tensor, pattern: Pattern) -> Tensor:
    """Keep-mask of a (O, I) score matrix."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    for row, values in enumerate(scores.tolist()):
        mask[row, removed_positions(values, pattern)] = False
    return mask


def magnitude(weight: Tensor, pattern: Pattern) -> Tensor:
    return mask_by_rows(weight.abs().float(), pattern)


def wanda(weight: Tensor, inputs: Tensor, pattern: Pattern) -> Tensor:
    """arXiv 2306.11695, eq. 1, with the norm over all tokens at once."""
    return mask_by_rows(weight.abs().float() * inputs.float().norm(dim=0), pattern)


def sparsegpt(weight: Tensor, inputs: Tensor, pattern: Pattern, *, blocksize: int = 128) -> tuple[Tensor, Tensor]:
    """arXiv 2301.00774, algorithm 1, in float64 and column by column: every column is updated at once, not lazily."""
    w, x = weight.double().clone(), inputs.double()
    hessian = 2 / len(x) * x.T @ x
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian)).T  # H^-1 = U^T U with U upper triangular
    rows, columns = w.shape
    mask = torch.ones_like(w, dtype=torch.bool)
    for j in range(columns):
        cost = w**2 / factor.diagonal() ** 2
        if isinstance(pattern, Unstructured) and j % blocksize == 0:
            end = min(j + blocksize, columns)
            flat = cost[:, j:end].flatten()
            gone = flat.argsort(stable=True)[: int(rows * (end - j) * pattern.sparsity + 1e-9)]
            part = torch.ones_like(flat, dtype=torch.bool)
            part[gone] = False
            mask[:, j:end] = part.view(rows, end - j)
        if isinstance(pattern, NM) and j % pattern.m == 0:
            for row in range(rows):
                mask[row, j + cost[row, j : j + pattern.m].argsort(stable=True)[: pattern.m - pattern.n]] = False
        error = torch.where(mask[:, j], 0.0, w[:, j] / factor[j, j])
        w[:, j:] -= error[:, None] * factor[j, j:]
        w[~mask[:, j], j] = 0
    return w, mask
