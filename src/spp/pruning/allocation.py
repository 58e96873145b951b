"""Layer-wise allocation: how much of each block goes, for a given mean.

OWL (arXiv 2310.05175): blocks with more outliers are pruned less. An outlier is an entry whose Wanda score is more than
M times the mean score of its matrix; here, as published, of all matrices of its block together.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def outlier_share(scored: Sequence[tuple[Tensor, Tensor]], threshold: float) -> float:
    """Share of a block's entries with |W[i, j]| * ||X[:, j]|| above `threshold` times their mean (OWL's LOD).

    Args:
        scored: the weight (O, I) and its `InputNorm` (I,) of every matrix of the block.
        threshold: M, 5 in the paper.
    """
    entries = sum(weight.numel() for weight, _ in scored)
    if not entries:
        return 0.0
    # |W| summed over rows, and only then weighted: no matrix of scores is needed for their mean.
    mean = sum(float(weight.abs().float().sum(dim=0).double() @ norm.double()) for weight, norm in scored) / entries
    limit = threshold * mean
    return sum(int((weight.abs().float() * norm > limit).sum()) for weight, norm in scored) / entries


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
    mean = sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)
    spread = max(abs(share - mean) for share in shares)
    reach = min(limit, 0.99 * target, 0.99 * (1 - target))
    return [target - reach * (share - mean) / spread for share in shares]
