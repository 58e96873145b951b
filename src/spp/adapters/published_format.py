"""Adapters that the published SPP code saved: pickles that call themselves LoRA.

    W' = W + s * repeat_interleave(A, O / R) * B * W        s = lora_alpha / r

`MODULE.lora_A.weight` is A, (R, I) with R = 16 whatever the settings' r says; `MODULE.lora_A.weight_col` is B, (O, 1)
in the first of the code's two variants and (1, O) in the second. An SPP adapter with one direction is equivalent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from spp.adapters.factors import (
    PICKLED_WEIGHTS,
    WEIGHTS,
    Factors,
    check_factors,
    parts_by_module,
    positive,
    read_pickled_tensors,
    read_tensors,
)
from spp.errors import SppError, UsageError, shown

_A, _B = "lora_A.weight", "lora_A.weight_col"
_LORA_B = "lora_B.weight"


def read_published(folder: Path, settings: Mapping[str, Any]) -> dict[str, Factors]:
    """Read an adapter of the published code: module name -> factors, with one direction.

    Args:
        folder: the adapter's folder.
        settings: its adapter_config.json.

    Raises:
        UsageError: it is a real LoRA adapter, or there are no weights.
        SppError: the file asks for code to be run, is damaged, lacks tensors, or has too many.
    """
    tensors = _tensors(folder)
    if any(name.endswith(_LORA_B) for name in tensors) and not any(name.endswith(_B) for name in tensors):
        raise UsageError(
            f"adapter {folder} is a LoRA adapter: its update is not a product with W, so neither SPP nor HiRA can "
            "express it; merge it with PEFT, and prune afterwards"
        )
    scale = _scale(settings, folder)
    parts = parts_by_module(tensors, (_A, _B), folder, "pairs of published SPP factors")
    factors = {
        module: Factors(A=part[_A], B=_column(part[_B], module, folder), scale=scale) for module, part in parts.items()
    }
    return check_factors(factors, folder)


def _tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder)
    if not (folder / PICKLED_WEIGHTS).is_file():
        raise UsageError(f"adapter {folder}: neither {WEIGHTS} nor {PICKLED_WEIGHTS} is there")
    return read_pickled_tensors(folder / PICKLED_WEIGHTS)


def _scale(settings: Mapping[str, Any], folder: Path) -> float:
    alpha, rank = settings.get("lora_alpha"), settings.get("r")
    above, below = positive(alpha), positive(rank)
    scale = above / below if above is not None and below is not None else None
    if scale is None or positive(scale) is None:
        raise SppError(
            f"adapter {folder}: adapter_config.json has lora_alpha {shown(alpha)} and r {shown(rank)}, and the scale "
            "is their quotient; both must be numbers above 0"
        )
    return scale


def _column(B: Tensor, module: str, folder: Path) -> Tensor:
    """B as (O, 1), from either layout."""
    if B.ndim != 2 or 1 not in B.shape:
        raise SppError(f"adapter {folder}: {module}.{_B} is {tuple(B.shape)}, and (O, 1) or (1, O) is expected")
    return B.reshape(-1, 1)
