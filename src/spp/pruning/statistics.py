"""Running statistics of a linear layer's inputs, accumulated over calibration batches in fp32.

Shapes: T tokens, I input features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Statistic(ABC):
    """A mean over tokens that is updated batch by batch.

    Attributes:
        tokens: how many inputs it has seen.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._mean: Tensor | None = None

    def update(self, inputs: Tensor) -> None:
        """Take in a batch of layer inputs, (..., I) in any float dtype."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if not len(rows):
            return
        total = self.tokens + len(rows)
        batch = self._sum(rows).div_(total)
        self._mean = batch if self._mean is None else self._mean.mul_(self.tokens / total).add_(batch)
        self.tokens = total

    def value(self) -> Tensor:
        """The statistic, fp32.

        Raises:
            ValueError: it has seen no input.
        """
        if self._mean is None:
            raise ValueError("the statistic has seen no input")
        return self._finish(self._mean)

    @abstractmethod
    def _sum(self, rows: Tensor) -> Tensor:
        """Sum over the tokens of a batch, (T, I) fp32."""

    @abstractmethod
    def _finish(self, mean: Tensor) -> Tensor:
        """From the mean over all tokens to the statistic."""


class InputNorm(Statistic):
    """Root mean square of every input feature, (I,): Wanda's ||X[:, j]||_2 up to one common factor."""

    def _sum(self, rows: Tensor) -> Tensor:
        return rows.square().sum(dim=0)

    def _finish(self, mean: Tensor) -> Tensor:
        return mean.sqrt()


class Gram(Statistic):
    """SparseGPT's Hessian of the squared output error, (I, I): H = 2/T X^T X."""

    def _sum(self, rows: Tensor) -> Tensor:
        with full_fp32():
            return rows.T @ rows

    def _finish(self, mean: Tensor) -> Tensor:
        return 2 * mean


@contextmanager
def full_fp32() -> Iterator[None]:
    """Multiply fp32 matrices in fp32: TF32 and bf16 shortcuts, if they are on, are off inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
