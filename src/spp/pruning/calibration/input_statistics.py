"""Running statistics of a linear layer's inputs, accumulated over calibration batches in fp32.

Shapes: T tokens, I input features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spp.ops.zeros import all_finite
from spp.runtime import distributed


class Statistic(ABC):
    """A mean over tokens that is updated batch by batch.

    Args:
        features: I.

    Attributes:
        tokens: how many inputs it has seen.
    """

    def __init__(self, features: int) -> None:
        self.tokens = 0
        self._features = features
        self._mean: Tensor | None = None
        self._values: dict[Callable[[Any], Any] | None, Any] = {}

    def update(self, inputs: Tensor) -> None:
        """Add a batch of layer inputs, (..., I) in any float dtype."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if not len(rows):
            return
        total = self.tokens + len(rows)
        if self._mean is None:
            self._mean = self._zeros(rows.device)
        self._mean = self._add(self._mean, self.tokens / total, rows, 1 / total)
        self.tokens, self._values = total, {}

    def value(self, derive: Callable[[Any], Any] | None = None) -> Any:
        """The statistic, fp32, or what `derive` makes of it; made once, for all layers that share it.

        Raises:
            ValueError: it has seen no input.
        """
        if self._mean is None or not self.tokens:
            raise ValueError("the statistic has seen no input")
        if derive not in self._values:
            self._values[derive] = derive(self.value()) if derive else self._finish(self._mean)
        return self._values[derive]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes after its first input."""
        return self._zeros(torch.device("meta")).nbytes

    def is_finite(self) -> bool:
        """Whether all inputs were finite, and small enough to be squared."""
        return self._mean is None or all_finite(self._mean)

    def all_reduce(self) -> None:
        """Combine the statistics of all processes; all of them get the same result."""
        if distributed.world_size() == 1:
            return
        mean = self._zeros(distributed.device()) if self._mean is None else self._mean
        tokens = torch.tensor(float(self.tokens), dtype=torch.float64, device=mean.device)
        total = int(distributed.all_reduce(tokens.clone()))
        self._mean = distributed.all_reduce(mean.mul_(self.tokens / max(total, 1)))
        self.tokens, self._values = total, {}

    @abstractmethod
    def _zeros(self, device: torch.device) -> Tensor:
        """The mean over no tokens, fp32."""

    @abstractmethod
    def _add(self, mean: Tensor, weight: float, rows: Tensor, share: float) -> Tensor:
        """`weight` times the mean plus `share` times the sum over the tokens of a batch (T, I); may be in place."""

    @abstractmethod
    def _finish(self, mean: Tensor) -> Any:
        """From the mean over all tokens to the statistic; leaves the mean as it is."""


class InputNorm(Statistic):
    """Root mean square of every input feature, (I,): Wanda's ||X[:, j]||_2 up to one common factor."""

    def _zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(self._features, device=device)

    def _add(self, mean: Tensor, weight: float, rows: Tensor, share: float) -> Tensor:
        return mean.mul_(weight).add_(rows.square().sum(dim=0), alpha=share)

    def _finish(self, mean: Tensor) -> Any:
        return mean.sqrt()


@dataclass(frozen=True)
class InputMoments:
    """Mean, variance and root mean square of every input feature, (I,) each."""

    mean: Tensor
    variance: Tensor
    norm: Tensor


class Moments(Statistic):
    """The statistic of DSnoT: `InputMoments`."""

    def _zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(2, self._features, device=device)

    def _add(self, mean: Tensor, weight: float, rows: Tensor, share: float) -> Tensor:
        sums = torch.stack((rows.sum(dim=0), rows.square().sum(dim=0)))
        return mean.mul_(weight).add_(sums, alpha=share)

    def _finish(self, mean: Tensor) -> InputMoments:
        first, second = mean
        return InputMoments(first, (second - first.square()).clamp(min=0), second.sqrt())


class Gram(Statistic):
    """SparseGPT's Hessian of the squared output error, (I, I): H = 2/T X^T X.

    Its value is not a copy, and is valid until the next input.
    """

    def _zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(self._features, self._features, device=device)

    def _add(self, mean: Tensor, weight: float, rows: Tensor, share: float) -> Tensor:
        with full_fp32():
            return mean.addmm_(rows.T, rows, beta=weight, alpha=2 * share)

    def _finish(self, mean: Tensor) -> Any:
        return mean


@contextmanager
def full_fp32() -> Iterator[None]:
    """Context manager that turns TF32 and bf16 shortcuts off, so that fp32 matrices are multiplied in fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
