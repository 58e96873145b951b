"""Compare a fine-tuned weight with its pruned base and count the differences, zeros first; pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spp.ops import native
from spp.ops.zeros import exactly_wider


@dataclass(frozen=True, kw_only=True)
class TensorProof:
    """How a tensor compares with the base tensor that it came from; all fields but the last are counts of entries.

    Attributes:
        zeros: zeros of the base (of either sign).
        offenders: zeros of the base that are no longer an exact +0.0; all zeros were kept if this is 0.
        negative_zeros: offenders that are -0.0.
        survivors: non-zeros of the base.
        underflowed: survivors that became zero (rounding); the base's zeros are kept all the same.
        unchanged: survivors with the same value as before, for instance because rounding swallowed their change.
        sign_flips: survivors that changed sign.
        non_finite: NaN or infinity where the base was finite.
        largest_relative_change: largest |other - base| / |base| over finite survivors.
    """

    zeros: int
    offenders: int
    negative_zeros: int
    survivors: int
    underflowed: int
    unchanged: int
    sign_flips: int
    non_finite: int
    largest_relative_change: float

    @property
    def holds(self) -> bool:
        """Whether all zeros were kept, and no NaN or infinity is new."""
        return self.offenders == 0 and self.non_finite == 0


def lost_zeros(base: Tensor, other: Tensor) -> int:
    """How many zeros of `base` (of either sign) are not an exact +0.0 in `other`."""
    return int(((base == 0) & ((other != 0) | torch.signbit(other))).count_nonzero())


def compare(base: Tensor, other: Tensor) -> TensorProof:
    """Compare a tensor with its base: what became of the zeros and of the survivors.

    In one pass by the native kernels where they take both dtypes; otherwise by `compare_in_torch`.

    Args:
        base: the pruned tensor, of any dtype that `exactly_wider` takes.
        other: of the same shape, likewise.
    """
    base, other = (_wide(one).contiguous().reshape(-1) for one in (base, other))
    if native.why_not(base, other):
        return compare_in_torch(base, other)
    return TensorProof(**native.compare(base, other))  # pyright: ignore[reportArgumentType]


def _wide(tensor: Tensor) -> Tensor:
    wide = exactly_wider(tensor)
    if wide is None:
        raise ValueError(f"a tensor of {tensor.dtype} has no zeros that can be compared")
    return wide


def may_hold_negative_zeros(tensor: Tensor) -> bool:
    """False if our kernels counted no -0.0 in a float tensor; True without them: counting is slower than rewriting."""
    flat = tensor.contiguous().reshape(-1)
    return bool(native.why_not(flat)) or compare(flat, flat).negative_zeros > 0


def compare_in_torch(base: Tensor, other: Tensor) -> TensorProof:
    """The readable form of `compare`; it needs several times the memory of the tensors."""
    zero = base == 0
    negative_zero = zero & (other == 0) & torch.signbit(other)
    finite = torch.isfinite(base)
    survivor = ~zero & finite & torch.isfinite(other)
    # fp32 represents fp16 and bf16 exactly; fp64 stays as it is.
    wide = torch.promote_types(torch.promote_types(base.dtype, other.dtype), torch.float32)
    before, after = base.to(wide), other.to(wide)
    change = torch.where(survivor, (after - before).abs() / before.abs(), torch.zeros((), dtype=wide))
    return TensorProof(
        zeros=int(zero.count_nonzero()),
        offenders=lost_zeros(base, other),
        negative_zeros=int(negative_zero.count_nonzero()),
        survivors=int((~zero).count_nonzero()),
        underflowed=int((~zero & (other == 0)).count_nonzero()),
        unchanged=int((~zero & (before == after)).count_nonzero()),
        sign_flips=int((survivor & (before.sign() * after.sign() < 0)).count_nonzero()),
        non_finite=int((finite & ~torch.isfinite(other)).count_nonzero()),
        largest_relative_change=float(change.max()) if change.numel() else 0.0,
    )
