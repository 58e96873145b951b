"""Quantize the survivors of a sparse matrix: each to the nearest value, or with error feedback.

Error feedback (GPTQ, arXiv 2210.17323, on SparseGPT's order of columns): with H^-1 = U^T U of the layer's inputs (U
upper triangular), columns are settled from left to right. Column j gets its final values q_j, and what that changes is
made up for by the columns to its right: w_k -= (w_j - q_j) U_jk / U_jj for all k > j. Where the matrix has a zero,
q_j = 0, whatever the columns to the left have added; so zeros stay zeros, and what they would have taken on goes on to
the survivors behind them.

Shapes: O output features, I input features, G groups of C columns (the last may have fewer), L levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spp.errors import SppError
from spp.ops.few_bits import FewBitWeight
from spp.ops.zeros import all_finite
from spp.pruning.calibration.input_statistics import full_fp32
from spp.pruning.criteria.result import row_parts
from spp.pruning.criteria.sparsegpt import Inverse
from spp.pruning.few_bits.codebook import BYTE, codebook, codes
from spp.pruning.few_bits.scales import fitted_levels, search_scales


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A sparse matrix with survivors in few bits, before it is packed.

    Attributes:
        codes: (O, I) uint8, indices into the codebook; they mean nothing outside of the mask.
        mask: (O, I) bool, True for survivors.
        scales: (O, G) fp16, positive.
        codebook: (2^bits,) int8, without a zero.
        bits: of a code.
        group: C.
    """

    codes: Tensor
    mask: Tensor
    scales: Tensor
    codebook: Tensor
    bits: int
    group: int

    def values(self) -> Tensor:
        """The matrix (O, I) fp32: scale times codebook[code], +0.0 outside of the mask."""
        rows = torch.zeros_like(self.codes, dtype=torch.float32)
        for part in row_parts(rows):
            scales = self.scales[part].float().repeat_interleave(self.group, dim=1)[:, : rows.shape[1]]
            rows[part] = self.codebook.float()[self.codes[part].int()].mul_(scales).masked_fill_(~self.mask[part], 0)
        return rows

    def error(self, weight: Tensor, hessian: Tensor | None = None) -> float:
        """The root of the squared error against the weight (O, I), as a share of the root of its squares; 0 for zeros.

        Of the numbers, |Q - W| / |W|; or, with a Hessian (I, I) of the layer's inputs, of its outputs.
        """
        squares = []
        for matrix in (self.values() - weight.float(), weight.float()):
            squares.append(
                float((matrix if hessian is None else matrix @ hessian).mul(matrix).sum(dtype=torch.float64))
            )
        off, whole = squares
        return math.sqrt(max(off, 0) / whole) if whole > 0 else 0.0

    def packed(self) -> FewBitWeight:
        """The same matrix without its zeros."""
        if self.bits == BYTE:
            return FewBitWeight.from_codes(
                self.codebook[self.codes.int()], self.mask, self.scales, None, self.bits, self.group
            )
        return FewBitWeight.from_codes(self.codes, self.mask, self.scales, self.codebook, self.bits, self.group)


def round_to_nearest(weight: Tensor, bits: int, group: int, importance: Tensor | None = None) -> Quantized:
    """Quantize every non-zero of a matrix to the nearest value, with a fitted codebook and searched scales.

    Args:
        weight: (O, I), any float dtype.
        bits: 2 to 8.
        group: columns with one scale in each row.
        importance: (I,) fp32, how much an error in each column counts; None: equally.

    Raises:
        SppError: NaN or infinity, or a weight that is too large.
    """
    require_finite(weight)
    importance = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance
    levels = fitted_levels(weight, importance, bits, group)
    found = torch.empty_like(weight, dtype=torch.uint8)
    scales = torch.empty(len(weight), -(-weight.shape[1] // group), dtype=torch.float16, device=weight.device)
    for part in row_parts(weight):
        rows = weight[part].float()
        scales[part] = search_scales(rows, importance, levels, group)
        found[part] = codes(rows / scales[part].float().repeat_interleave(group, dim=1)[:, : rows.shape[1]], levels)
    return Quantized(codes=found, mask=weight != 0, scales=scales, codebook=codebook(levels), bits=bits, group=group)


def with_feedback(weight: Tensor, inverse: Inverse, importance: Tensor, bits: int, group: int) -> Quantized:
    """Quantize the non-zeros of a matrix so that the layer's outputs change least; see the module.

    The scales of a group are searched when the columns before it are settled.

    Args:
        weight: (O, I), any float dtype.
        inverse: of the layer's damped Hessian.
        importance: (I,) fp32, how much an error in each column counts in the search for scales.
        bits: 2 to 8.
        group: columns with one scale in each row.

    Raises:
        SppError: NaN or infinity in the weight or after an update, or a weight that is too large.
    """
    require_finite(weight)
    levels = fitted_levels(weight, importance, bits, group)
    work = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    mask = work != 0
    found, scales = torch.empty_like(work, dtype=torch.uint8), []
    with full_fp32():
        for start in range(0, len(work), group):
            block, end = slice(start, start + group), start + group
            columns, kept = work[block], mask[block]
            survivors = columns.masked_fill(~kept, 0).T
            if not all_finite(survivors):
                raise SppError("error feedback leads to NaN or infinity; calibrate with more samples")
            scales.append(search_scales(survivors, importance[block], levels, group))
            found[block], errors = _settled(columns, kept, inverse.factor[block, block], scales[-1][:, 0], levels)
            work[end:].addmm_(inverse.factor[block, end:].T, errors, alpha=-1)
    return Quantized(
        codes=found.T.contiguous(),
        mask=mask.T.contiguous(),
        scales=torch.cat(scales, dim=1),
        codebook=codebook(levels),
        bits=bits,
        group=group,
    )


def _settled(columns: Tensor, mask: Tensor, unit: Tensor, scales: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Settle the columns of a group one by one.

    Args:
        columns: (C, O), updated for all columns to their left; changed in place.
        mask: (C, O).
        unit: (C, C), U_jk / U_jj.
        scales: (O,) of the rows.
        levels: (L,).

    Returns:
        Codes and errors w - q, (C, O) each.
    """
    found, errors = torch.empty_like(columns, dtype=torch.uint8), torch.empty_like(columns)
    values, scales = codebook(levels).float(), scales.float()
    for j, column in enumerate(columns):
        if j:
            column.addmv_(errors[:j].T, unit[:j, j], alpha=-1)
        found[j] = codes(column / scales, levels)
        errors[j] = column - values[found[j].int()].mul_(scales).masked_fill_(~mask[j], 0)
    return found, errors


def require_finite(weight: Tensor) -> None:
    """Check a weight that is to be quantized.

    Raises:
        SppError: it has NaN or infinity.
    """
    if not all_finite(weight):
        raise SppError("it holds NaN or infinity, which few bits cannot; the model is damaged")
