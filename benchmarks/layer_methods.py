"""Every way to run one linear layer forward and backward that `benchmarks/layer.py` compares, by name.

All methods share one weight W (O, I), one input x (T, I) that wants a gradient, as in the middle of a network, and one
dY (T, O). The trained factors are fp32; for bf16 and fp16, methods run under autocast, as a Trainer with bf16=True
does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines import published, stock_peft
from benchmarks.common import DTYPES, Step, sparse_weight
from spp import ops
from spp.ops.packed import PackedWeight, Weight

RANK = 16
SCALE = 2.0
METHODS = (
    "floor",
    "floor4",
    "reference",
    "torch",
    "native",
    "triton",
    "packed",
    "split",
    "split_packed",
    "published1",
    "published2",
    "peft_hira",
    "peft_lora",
    "full",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a layer is measured at.

    Attributes:
        shape: (O, I).
        tokens: T.
        dtype: a key of `DTYPES`: of W, x and dY.
        density: share of W that is not zero.
        device: cpu or cuda.
    """

    shape: tuple[int, int]
    tokens: int
    dtype: str
    density: float
    device: str = "cpu"

    def columns(self) -> dict[str, str | int | float]:
        """As columns of a CSV row; the device is in the machine's columns."""
        out_features, in_features = self.shape
        return {
            "shape": f"{out_features}x{in_features}",
            "tokens": self.tokens,
            "dtype": self.dtype,
            "density": self.density,
        }


class Layer:
    """The tensors of a case, and its methods."""

    def __init__(self, case: Case) -> None:
        self.case, self.dtype = case, DTYPES[case.dtype]
        out_features, in_features = case.shape
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.weight = sparse_weight(*case.shape, case.density, self.dtype).to(case.device)
        self.x = random(case.tokens, in_features).to(case.device, self.dtype).requires_grad_()
        self.dy = random(case.tokens, out_features).to(case.device, self.dtype)
        self.A = (random(RANK, in_features) * in_features**-0.5).to(case.device).requires_grad_()
        self.B = (random(out_features, 1) * 0.1).to(case.device).requires_grad_()  # not 0, as after some steps

    @cached_property
    def packed(self) -> PackedWeight:
        """The weight without its zeros."""
        return ops.pack(self.weight)

    def methods(self, names: Sequence[str]) -> dict[str, Step | None]:
        """Name -> one forward and backward pass; None for a back-end that this machine lacks."""
        fast = "native" if self.case.device == "cpu" else "auto"
        make: dict[str, Callable[[], Step | None]] = {
            "floor": lambda: partial(self._products, forwards=1),
            "floor4": lambda: partial(self._products, forwards=2),
            "reference": lambda: self._spp("reference"),
            "torch": lambda: self._spp("torch"),
            "native": lambda: self._spp("native"),
            "triton": lambda: self._spp("triton"),
            "packed": lambda: self._spp(fast, packed=True),
            "split": lambda: self._spp(fast, mode="split"),
            "split_packed": lambda: self._spp(fast, packed=True, mode="split"),
            "published1": lambda: self._published(published.variant1),
            "published2": lambda: self._published(published.variant2),
            "peft_hira": lambda: self._peft(stock_peft.hira),
            "peft_lora": lambda: self._peft(stock_peft.lora),
            "full": self._full,
        }
        return {name: make[name]() for name in names}

    def _products(self, forwards: int) -> None:
        """The bare GEMMs: x W^T, dY W, dY^T x; x W^T twice for a forward in two branches."""
        with torch.no_grad():
            for _ in range(forwards):
                self.x @ self.weight.T
            self.dy @ self.weight
            self.dy.T @ self.x

    def _spp(self, backend: str, *, packed: bool = False, mode: str = "fused") -> Step | None:
        weight: Weight = self.packed if packed else self.weight
        if backend != "auto" and ops.why_not(backend, weight, self.x):
            return None
        return self._trained(
            lambda: ops.spp_linear(self.x, weight, self.A, self.B, SCALE, backend=backend, mode=mode), [self.A, self.B]
        )

    def _published(self, variant: Callable[..., Tensor]) -> Step | None:
        if len(self.weight) % RANK:
            return None
        return self._trained(lambda: variant(self.x, self.weight, self.A, self.B, SCALE), [self.A, self.B])

    def _peft(self, adapt: Callable[[Tensor], torch.nn.Module]) -> Step:
        model = adapt(self.weight)
        return self._trained(lambda: model(self.x), stock_peft.trained(model))

    def _full(self) -> Step:
        weight = self.weight.detach().requires_grad_()
        return self._trained(lambda: F.linear(self.x, weight), [weight])

    def _trained(self, forward: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Step:
        """Forward, and gradients of x and of the method's parameters."""

        def step() -> None:
            with torch.autocast(self.case.device, self.dtype, enabled=self.dtype != torch.float32):
                y = forward()
            torch.autograd.grad(y, [self.x, *parameters], self.dy.to(y.dtype))

        return step
