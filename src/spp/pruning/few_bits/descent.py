"""Coordinate descent on codes (as QuantEase, arXiv 2309.01885): exact where error feedback is not.

Error feedback looks to the right only, and lets zeros take on what they cannot keep. Afterwards, with D = W - Q and all
other columns as they are, the error tr(D H D^T) of the layer's outputs is least for column j at

    q_j + (D H)_j / H_jj,

and the nearest value of the codebook is the best that there is, since the error is a parabola. Zeros stay out of it.
So no step makes the error larger. Scales and codebook stay as they are.

Shapes: O output features, I input features, C columns of a block.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from spp.pruning.calibration.input_statistics import full_fp32
from spp.pruning.few_bits.codebook import codes
from spp.pruning.few_bits.quantize import Quantized

_PASSES = 2


def descended(weight: Tensor, quantized: Quantized, hessian: Tensor) -> Quantized:
    """The same scales and codebook with codes of less error.

    Args:
        weight: (O, I), before it was quantized, any float dtype.
        quantized: of the weight.
        hessian: (I, I) fp32, damped, so that no diagonal entry is zero.
    """
    found = quantized.codes.T.contiguous()
    off = (weight.float() - quantized.values()).T.contiguous()
    scales, mask = quantized.scales.float().T.contiguous(), quantized.mask.T.contiguous()
    values = quantized.codebook.float()
    with full_fp32():
        for _ in range(_PASSES):
            for start in range(0, len(off), quantized.group):
                block = slice(start, start + quantized.group)
                slope = hessian[block] @ off
                scale = scales[start // quantized.group]
                for j, column in enumerate(found[block]):
                    before = values[column.int()] * scale
                    row = hessian[start + j, block]
                    column.copy_(codes((before + slope[j] / row[j]) / scale, values[values > 0]))
                    change = (before - values[column.int()] * scale).masked_fill_(~mask[start + j], 0)
                    off[start + j] += change
                    slope += row[:, None] * change
    return replace(quantized, codes=found.T.contiguous())
