"""Divergence of a model's next-token distributions from a teacher's full distributions, or from its likeliest tokens.

Shapes: N predicted tokens, V vocabulary, K stored tokens of each of the teacher's distributions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Sum over tokens of T^2 KL(teacher || student), both softened by T (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        logits: (N, V), the student's, any float dtype.
        teacher: (N, V), the teacher's logits.
        temperature: T.

    Returns:
        A scalar in nats, fp32, differentiable in `logits`.
    """
    expected, found = ((one.float() / temperature).log_softmax(dim=-1) for one in (teacher, logits))
    return temperature**2 * F.kl_div(found, expected, reduction="sum", log_target=True)


def divergence_of_top(logits: Tensor, tokens: Tensor, log_probabilities: Tensor, temperature: float) -> Tensor:
    """`divergence` from K stored tokens of the teacher; all others count as one token, so it is a lower bound.

    Args:
        logits: (N, V).
        tokens: (N, K), distinct ids.
        log_probabilities: (N, K), the teacher's at this temperature, any float dtype.
        temperature: T.
    """
    found, tokens = (logits.float() / temperature).log_softmax(dim=-1), tokens.long()
    known = log_probabilities.float()
    total = (known.exp() * (known - found.gather(1, tokens))).sum()
    if tokens.shape[1] < found.shape[1]:
        other = (1 - known.exp().sum(dim=1)).clamp(min=0)
        found_other = found.scatter(1, tokens, -torch.inf).logsumexp(dim=1)
        total = total + (torch.special.xlogy(other, other) - other * found_other).sum()
    return temperature**2 * total


def top_log_probabilities(logits: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """A teacher's likeliest tokens (N, K), int32, and their log-probabilities at a temperature (N, K), fp16.

    Args:
        logits: (N, V).
        count: K, at most V.
        temperature: T.
    """
    values, tokens = (logits.float() / temperature).log_softmax(dim=-1).topk(count, dim=-1)
    return tokens.int(), values.half()
