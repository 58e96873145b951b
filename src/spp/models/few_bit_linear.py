"""A linear layer whose sparse weight has survivors in few bits."""

from __future__ import annotations

from torch import Tensor, nn

from spp.ops.few_bit_matmul import few_bit_matmul
from spp.ops.few_bits import FewBitWeight


class FewBitLinear(nn.Module):
    """y = x W^T + bias with W (O, I) in few bits, in the dtype of x, to compute with and not to train.

    Its parameters are the tensors of a `spp.ops.few_bits.FewBitWeight`, which get no gradient, and `bias`.

    Args:
        weight: (O, I).
        bias: (O,) or None.
    """

    def __init__(self, weight: FewBitWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits, self.group, self._per_word = weight.bits, weight.group, weight.per_word
        for name, tensor in weight.tensors().items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", bias)

    @property
    def few_bits(self) -> FewBitWeight:
        """The weight (O, I); it shares the layer's memory."""
        codes, bitmask, row_offsets, scales, codebook = (
            self.get_parameter(name) for name in ("codes", "bitmask", "row_offsets", "scales", "codebook")
        )
        return FewBitWeight(
            codes, bitmask, row_offsets, scales, codebook, self.in_features, self.bits, self.group, self._per_word
        )

    @property
    def weight(self) -> Tensor:
        """A dense copy of the weight, (O, I) fp32, expanded at every access."""
        return self.few_bits.unpack()

    def forward(self, x: Tensor) -> Tensor:
        """y (..., O), in x's dtype, for x (..., I); with few tokens x is rounded, see `few_bit_matmul`."""
        return few_bit_matmul(x, self.few_bits, self._parameters["bias"])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group={self.group}"
