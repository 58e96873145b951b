"""Slow, literal implementations of the published formulas, written for comparison only."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from spp.patterns import NM, Pattern
from spp.pruning.criteria import reference
from spp.pruning.criteria.sparsegpt import Inverse


def removed_positions(scores: list[float], pattern: Pattern, row: int = 0) -> list[int]:
    """Positions of a row that go: the lowest scores of the row, or of each group; the earlier one of equal scores.

    Of a ratio, the rows up to any row together lose its share of their weights, rounded down.
    """
    size = pattern.m if isinstance(pattern, NM) else len(scores)
    if isinstance(pattern, NM):
        count = pattern.m - pattern.n
    else:
        share = Fraction(str(pattern)[:-1]) / 100
        count = math.floor((row + 1) * size * share) - math.floor(row * size * share)
    removed = []
    for start in range(0, len(scores), size):
        group = sorted(range(start, start + size), key=lambda position: (scores[position], position))
        removed += group[:count]
    return removed


def mask_by_rows(scores: Tensor, pattern: Pattern) -> Tensor:
    """Keep-mask of a (O, I) score matrix."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    for row, values in enumerate(scores.tolist()):
        mask[row, removed_positions(values, pattern, row)] = False
    return mask


def magnitude(weight: Tensor, pattern: Pattern) -> Tensor:
    return mask_by_rows(weight.abs().float(), pattern)


def wanda(weight: Tensor, inputs: Tensor, pattern: Pattern) -> Tensor:
    """arXiv 2306.11695, eq. 1, with the norm over all tokens at once."""
    return mask_by_rows(weight.abs().float() * inputs.float().norm(dim=0), pattern)


def sparsegpt(weight: Tensor, inputs: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """arXiv 2301.00774: eq. 2 to 4 and the damping as they are written, in float64, then the readable loop."""
    x = inputs.double()
    hessian = 2 / len(x) * x.T @ x
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian)).T  # H^-1 = U^T U with U upper triangular
    scale = factor.diagonal()
    pruned = reference.sparsegpt(weight, Inverse(factor / scale[:, None], scale, dead, None), pattern)
    return pruned.weight, pruned.mask


def admm(weight: Tensor, inputs: Tensor, pattern: Pattern, fixed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """arXiv 2401.02938: algorithm 1 with the gradual mask of section 3.3, as it is written, in float64; 20 steps."""
    w, x = weight.double(), inputs.double()
    hessian = 2 / len(x) * x.T @ x
    norms = hessian.diagonal().sqrt()
    dead = norms == 0
    norms[dead] = 1
    w = w * norms * ~dead
    hessian = hessian / norms / norms[:, None]
    hessian += 0.1 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.inv(hessian + torch.eye(len(hessian), dtype=torch.float64))
    may_stay, mask = w != 0, fixed
    v, u = w.clone(), torch.zeros_like(w)
    for step in range(1, 21):
        if fixed is None and step <= 15:
            sizes, ratio = (v + u).abs().masked_fill(~may_stay, -1), pattern.sparsity * (1 - (1 - step / 15) ** 3)
            place = sizes.flatten().argsort(stable=True).argsort().view_as(w)
            mask = mask_by_rows(sizes, pattern) if isinstance(pattern, NM) else place >= int(w.numel() * ratio + 1e-9)
        assert mask is not None
        z = mask * may_stay * (v + u)
        u = u + (v - z)
        v = (w @ hessian + (z - u)) @ inverse
    return z / norms, mask & may_stay


def least_squares(weight: Tensor, mask: Tensor, inputs: Tensor) -> Tensor:
    """Row by row, the normal equations of the kept columns with SparseGPT's damping, in float64."""
    x, w, found = inputs.double(), weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    hessian = 2 / len(x) * x.T @ x
    hessian += torch.diag((hessian.diagonal() == 0).double())
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    for row, kept in enumerate(mask):
        columns = kept.nonzero()[:, 0]
        found[row, columns] = torch.linalg.solve(hessian[columns][:, columns], (hessian @ w[row])[columns])
    return found


def swaps(
    weight: Tensor, value: Tensor, mask: Tensor, inputs: Tensor, pattern: Pattern, *, fixed: bool
) -> tuple[Tensor, Tensor]:
    """arXiv 2512.10922: the best exchange of every row again and again, found by trying all of them; in float64."""
    x, w, v, mask = inputs.double(), weight.double(), value.double().clone(), mask.clone()
    hessian = 2 / len(x) * x.T @ x

    def error(row: int, candidate: Tensor) -> float:
        return float((w[row] - candidate) @ hessian @ (w[row] - candidate))

    for row in range(len(w)):
        for _ in range(200):
            best, after, exchange = error(row, v[row]), None, None
            for i in mask[row].nonzero()[:, 0].tolist():
                for j in (~mask[row]).nonzero()[:, 0].tolist():
                    if w[row, j] == 0 or (isinstance(pattern, NM) and i // pattern.m != j // pattern.m):
                        continue
                    candidate = v[row].clone()
                    candidate[i] = 0
                    rest = ((w[row] - candidate) @ hessian)[j] / hessian[j, j]
                    candidate[j] = w[row, j] if fixed else rest
                    if (found := error(row, candidate)) < best * (1 - 1e-6):
                        best, after, exchange = found, candidate, (i, j)
            if after is None or exchange is None:
                break
            v[row] = after
            mask[row, exchange[0]], mask[row, exchange[1]] = False, True
    return v, mask


def magnitude_over_the_matrix(weight: Tensor, pattern: Pattern) -> Tensor:
    """As in Wanda's repository: all weights of the matrix compete; groups of N:M are the same as by rows."""
    if isinstance(pattern, NM):
        return magnitude(weight, pattern)
    return mask_by_rows(weight.abs().float().reshape(1, -1), pattern).view_as(weight)


def ria(weight: Tensor, inputs: Tensor, pattern: Pattern) -> Tensor:
    """ICLR 2024 "Plug-and-Play", eq. 2 and 3, entry by entry; a = 0.5."""
    w, norms = weight.abs().float(), inputs.float().norm(dim=0)
    rows, columns = w.sum(dim=1).tolist(), w.sum(dim=0).tolist()
    scores = torch.tensor(
        [
            [(w[i, j] / rows[i] + w[i, j] / columns[j]) * norms[j] ** 0.5 for j in range(w.shape[1])]
            for i in range(len(w))
        ]
    )
    return mask_by_rows(scores, pattern)


def outlier_share(weights: list[Tensor], inputs: list[Tensor], threshold: float) -> float:
    """arXiv 2310.05175: how many of a block's Wanda scores are above `threshold` times their mean."""
    pairs = zip(weights, inputs, strict=True)
    scores = torch.cat([(w.abs() * x.norm(dim=0) / len(x) ** 0.5).flatten() for w, x in pairs])
    return sum(score > threshold * scores.mean() for score in scores).item() / len(scores)


def dsnot(weight: Tensor, mask: Tensor, inputs: Tensor, pattern: Pattern) -> Tensor:
    """arXiv 2310.08915 without exchanges that make the error larger, row by row and weight by weight; in float64."""
    w, x, mask = weight.double(), inputs.double(), mask.clone()
    change, scores = w * x.mean(dim=0), w.abs() * x.square().mean(dim=0).sqrt()
    gain = change / x.var(dim=0, unbiased=False)
    for row in range(len(w)):
        out = {j for j in range(w.shape[1]) if not mask[row, j]}
        kept = set(range(w.shape[1])) - out
        error = sum(change[row, j].item() for j in out)
        sign = error > 0
        for _ in range(50):
            towards = 1 if error > 0 else -1
            grow = max(out, key=lambda j: towards * gain[row, j], default=None)
            if abs(error) <= 0.1 / 2048 or grow is None or towards * gain[row, grow] <= 0:
                break
            if isinstance(pattern, NM):
                pool = [j for j in kept if j // pattern.m == grow // pattern.m]
            else:
                pool = [j for j in kept if towards * change[row, j] < 0]
            remove = min(pool, key=lambda j: scores[row, j], default=None)
            if remove is None:
                break
            after = error + (change[row, remove] - change[row, grow]).item()
            if abs(after) >= abs(error) or (isinstance(pattern, NM) and (after > 0) != sign):
                break
            error = after
            mask[row, grow], mask[row, remove] = True, False
            out.remove(grow)
            kept.remove(remove)
    return mask
