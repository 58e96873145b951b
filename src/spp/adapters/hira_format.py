"""Convert SPP factors to those of HiRA (W' = W + W * (B_h A_h)), which stock PEFT loads without spp, and back.

    B_h[i, K g(i) + k] = s * B[i, k], zero elsewhere        A_h = A        rank R K

Both conversions are exact. A scale that is a power of two changes exponents only; for any other scale, s * B is rounded
as merging rounds it, so that the merged weights have the same bits.

Shapes: O output features, I input features, R row groups, K directions, N rank. A_h (N, I), B_h (O, N).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spp.adapters.factors import KEY_PREFIX, Factors, parts_by_module
from spp.errors import SppError, UsageError
from spp.ops.reference import MOST_DIRECTIONS, fitting_groups, row_groups, wide_dtype
from spp.ops.zeros import is_float

_A, _B = "hira_A", "hira_B"


def hira_rank(factors: Mapping[str, Factors]) -> int:
    """The rank that every module's factors fit into: PEFT gives all modules one rank (0.21.2 ignores rank_pattern)."""
    return max(len(one.A) for one in factors.values())


def hira_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The tensors of a HiRA adapter's file, all of rank `hira_rank`; factors of lower rank are padded with zeros."""
    rank = hira_rank(factors)
    tensors = {}
    for module, one in factors.items():
        A = one.A.new_zeros(rank, one.A.shape[1])
        A[: len(one.A)] = one.A
        tensors[f"{KEY_PREFIX}{module}.{_A}"] = A
        tensors[f"{KEY_PREFIX}{module}.{_B}"] = _spread(_scaled(one.B, one.scale), one.groups, rank)
    return tensors


def _scaled(B: Tensor, scale: float) -> Tensor:
    """s * B, in B's dtype if that represents it exactly, else in fp32 (fp64 if B is)."""
    wide = scale * B.to(wide_dtype(B))
    narrow = wide.to(B.dtype)
    return narrow if narrow.to(wide.dtype).equal(wide) else wide


def _spread(B: Tensor, groups: int, rank: int) -> Tensor:
    """(O, K) -> (O, N), each row's K values in the columns of its group."""
    return B.new_zeros(len(B), rank).scatter_(1, _columns(len(B), groups, B.shape[1]), B)


def _columns(out_features: int, groups: int, directions: int) -> Tensor:
    """K g(i) + k, (O, K): the columns in which row i has its values."""
    return directions * row_groups(out_features, groups)[:, None] + torch.arange(directions)


def read_hira(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of a saved HiRA adapter: module name -> A_h, B_h.

    Args:
        tensors: of its file, without weights that were trained whole.
        folder: the adapter's folder, for errors.

    Raises:
        SppError: there is more than factors of linear layers.
    """
    what = "pairs of HiRA factors of linear layers (factors of embeddings have no place in an SPP adapter)"
    parts = parts_by_module(tensors, (_A, _B), folder, what)
    pairs = {module: (part[_A], part[_B]) for module, part in parts.items()}
    for module, (A, B) in pairs.items():
        whole = A.ndim == B.ndim == 2 and len(A) == B.shape[1] and A.numel() and B.numel()
        if not (whole and is_float(A) and is_float(B)):
            raise SppError(
                f"adapter {folder}: {module} has A {tuple(A.shape)} of {A.dtype} and B {tuple(B.shape)} of {B.dtype}, "
                "where floats of (N, I) and (O, N) are expected"
            )
    return pairs


def factors_of_hira(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    *,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    scale: float = 1.0,
) -> dict[str, Factors]:
    """The SPP factors that are equivalent to HiRA's.

    They exist if the non-zeros of each row of B_h lie in the columns of the row's group. With a single group they
    always do, so HiRA of rank 16 or less is SPP with R = 1.

    Args:
        pairs: module -> A_h, B_h.
        shapes: module -> (R, K) to try first; by default, and where they do not fit, the fewest directions that do.
        scale: s, by which B_h is divided if that is exact; else s = 1.

    Raises:
        UsageError: names a module that no SPP factors express.
    """
    layouts = {module: _Layout.of(A, B) for module, (A, B) in pairs.items()}
    if not (shapes and all(layout.fits(*shapes.get(module, (0, 0))) for module, layout in layouts.items())):
        shapes = _common_shapes(layouts)
    scale = scale if all(_divides(B, scale) for _, B in pairs.values()) else 1.0
    return {module: _gathered(A, B, *shapes[module], scale) for module, (A, B) in pairs.items()}


@dataclass(frozen=True)
class _Layout:
    """Where B_h of a module has non-zeros: first and last column of each row, (O,) each, and its N columns."""

    first: Tensor
    last: Tensor
    rank: int

    @classmethod
    def of(cls, A: Tensor, B: Tensor) -> _Layout:
        rank, places = len(A), torch.arange(len(A))
        first = torch.where(B != 0, places, rank).amin(dim=1)
        return cls(first, torch.where(B != 0, places, -1).amax(dim=1), rank)

    def fits(self, groups: int, directions: int) -> bool:
        """Whether all non-zeros of a row lie in the columns of its group."""
        if not (0 < groups <= len(self.first) and 0 < groups * directions <= self.rank):
            return False
        start = directions * row_groups(len(self.first), groups)
        return bool(((self.first >= start) & (self.last < start + directions) | (self.last < 0)).all())

    def shape(self, directions: int) -> tuple[int, int] | None:
        """R, the largest that fits, and K of this module with at most `directions` directions; None if none fit."""
        for asked in range(min(self.rank, len(self.first)), 0, -1):
            groups, own = fitting_groups(len(self.first), asked, directions)
            if self.fits(groups, own):
                return groups, own
        return None


def _common_shapes(layouts: Mapping[str, _Layout]) -> dict[str, tuple[int, int]]:
    """(R, K) of every module, with the fewest directions that fit all modules."""
    possible: dict[str, set[int]] = {module: set() for module in layouts}
    for directions in range(1, MOST_DIRECTIONS + 1):
        shapes = {module: layout.shape(directions) for module, layout in layouts.items()}
        if found := {module: shape for module, shape in shapes.items() if shape}:
            for module in found:
                possible[module].add(directions)
            if len(found) == len(layouts):
                return found
    if stuck := [module for module, counts in possible.items() if not counts]:
        raise UsageError(
            f"{stuck[0]}: a row of HiRA's B has non-zeros outside of one group's columns, and its rank "
            f"{layouts[stuck[0]].rank} is above {MOST_DIRECTIONS}, so that no SPP factors are equivalent ({len(stuck)} "
            f"of {len(layouts)} modules); keep it as it is, or train with SPP"
        )
    needs = {min(counts): module for module, counts in possible.items()}
    few, many = min(needs), max(needs)
    raise UsageError(
        f"{needs[few]} fits {few} directions and {needs[many]} fits {many}, and all modules of an SPP adapter have the "
        "same number of them; keep it as it is, or train with SPP"
    )


def _divides(B: Tensor, scale: float) -> bool:
    return _scaled(_quotient(B, scale), scale).equal(B)


def _quotient(B: Tensor, scale: float) -> Tensor:
    return (B.to(wide_dtype(B)) / scale).to(B.dtype)


def _gathered(A: Tensor, B: Tensor, groups: int, directions: int, scale: float) -> Factors:
    own = B.gather(1, _columns(len(B), groups, directions))
    return Factors(A=A[: groups * directions].clone(), B=_quotient(own, scale), scale=scale)
