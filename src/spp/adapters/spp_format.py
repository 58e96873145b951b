"""SPP adapters as the tuner saves them: `MODULE.spp_A.weight` (R K, I), `MODULE.spp_B.weight` (O, K), and the scale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from spp.adapters.factors import (
    KEY_PREFIX,
    Factors,
    check_factors,
    parts_by_module,
    positive,
    read_settings,
    read_tensors,
)
from spp.errors import SppError, UsageError, shown

_A, _B = "spp_A.weight", "spp_B.weight"


def read_adapter(folder: Path) -> dict[str, Factors]:
    """Read a saved SPP adapter: module name -> factors.

    Raises:
        UsageError: there is no adapter, or it is of another method.
        SppError: the file is damaged or holds more than SPP factors.
    """
    settings = read_settings(folder)
    if settings.get("peft_type") != "SPP":
        raise UsageError(
            f"adapter {folder} is of type {settings.get('peft_type')!r}, but only SPP adapters can be used here; "
            "spp convert makes one from a HiRA adapter, or from one of the published code"
        )
    what = "pairs of SPP factors (if it trained other modules as well, merge it with PeftModel.merge_and_unload)"
    parts = parts_by_module(read_tensors(folder), (_A, _B), folder, what)
    scale = _scale(settings, folder)
    factors = {module: Factors(A=part[_A], B=part[_B], scale=scale) for module, part in parts.items()}
    directions = settings.get("directions", 1)  # old adapters, from before there were several, lack the setting
    for module, one in check_factors(factors, folder).items():
        if not (isinstance(directions, int) and one.directions <= directions):
            raise SppError(
                f"adapter {folder}: {module} has {one.directions} directions, and adapter_config.json says "
                f"{directions!r}; the two files do not belong together"
            )
    return factors


def tensors_of(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The tensors of an SPP adapter's file."""
    tensors = {}
    for module, one in factors.items():
        tensors[f"{KEY_PREFIX}{module}.{_A}"] = one.A.contiguous()
        tensors[f"{KEY_PREFIX}{module}.{_B}"] = one.B.contiguous()
    return tensors


def _scale(settings: Mapping[str, Any], folder: Path) -> float:
    scale = positive(settings.get("scale"))
    if scale is None:
        raise SppError(
            f"adapter {folder}: adapter_config.json has the scale {shown(settings.get('scale'))}, but it must be a "
            "number above 0, and finite"
        )
    return scale
