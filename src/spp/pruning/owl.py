"""Layer-wise allocation: the sparsity of each block, for a given mean.

OWL (arXiv 2310.05175): blocks with more outliers are pruned less. An outlier is an entry whose Wanda score is more than
M times the mean score of its matrix; here, as published, of all matrices of its block together.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor

from spp.pruning.criteria.result import row_parts


def outlier_share(scored: Sequence[tuple[Tensor, Tensor]], threshold: float) -> float:
    """Share of a block's entries with |W[i, j]| * ||X[:, j]|| above `threshold` times their mean (OWL's LOD).

    Args:
        scored: the weight (O, I) and its `InputNorm` (I,) of every matrix of the block.
        threshold: M, 5 in the paper.
    """
    entries = sum(weight.numel() for weight, _ in scored)
    if not entries:
        return 0.0
    # Some rows at a time: no matrix of scores is made.
    parts = [(weight[rows], norm) for weight, norm in scored for rows in row_parts(weight)]
    limit = threshold * sum(float(_scores(part, norm).sum()) for part, norm in parts) / entries
    return sum(int((_scores(part, norm) > limit).sum()) for part, norm in parts) / entries


def _scores(weight: Tensor, norm: Tensor) -> Tensor:
    """Wanda's, (O, I) fp32."""
    return weight.abs().float() * norm


def owl_ratios(shares: Sequence[float], sizes: Sequence[int], target: float, limit: float) -> list[float]:
    """Sparsity of every block: target - limit * (D_l - mean D) / max |D - mean D|.

    So the ratios differ from the target by `limit` at most, and their mean, weighted by the blocks' sizes, is the
    target. (The published code spreads them over 2 * limit as well, but lets one side go beyond `limit`.)

    Args:
        shares: D, the share of outliers of each block.
        sizes: weights in each block.
        target: mean sparsity, between 0 and 1.
        limit: lambda, 0.08 in the paper; less where the ratios would leave (0, 1).
    """
    if max(shares) == min(shares):
        return [target] * len(shares)
    # Exact, since shares that hardly differ have a rounded mean that need not lie between them.
    exact = [Fraction(share) for share in shares]
    mean = sum(share * size for share, size in zip(exact, sizes, strict=True)) / sum(sizes)
    spread = max(abs(share - mean) for share in exact)
    reach = min(limit, 0.99 * target, 0.99 * (1 - target))
    return [target - reach * float((share - mean) / spread) for share in exact]
