"""SPP adapters as the tuner saves them: the factors of linear layers and of stacked experts, and the scale.

    MODULE.spp_A.weight (R K, I)            MODULE.spp_B.weight (O, K)
    EXPERTS.spp_A.STACK.weight (E, R K, I)  EXPERTS.spp_B.STACK.weight (E, O, K)    STACK: down_proj, gate_up_proj, ...

A file may hold weights that were trained whole as well, under their own names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
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
from spp.adapters.trained_whole import Whole, split_whole
from spp.errors import SppError, UsageError, shown

_A, _B = "spp_A.weight", "spp_B.weight"
_OF_STACK = re.compile(r"(.+)\.(spp_[AB])\.([^.]+)\.weight$")


@dataclass(frozen=True)
class Adapter:
    """A saved SPP adapter.

    Attributes:
        factors: name of a linear layer, or of a stack of experts, in the model -> factors.
        whole: name of a weight in the model -> what it becomes; these were trained whole, without SPP.
    """

    factors: dict[str, Factors]
    whole: dict[str, Whole]


def read_adapter(folder: Path) -> Adapter:
    """Read a saved SPP adapter.

    Raises:
        UsageError: there is no adapter, or it is of another method.
        SppError: the file is damaged or holds more than SPP factors and weights of `modules_to_save`.
    """
    settings = read_settings(folder)
    if settings.get("peft_type") != "SPP":
        raise UsageError(
            f"adapter {folder} is of type {settings.get('peft_type')!r}, but only SPP adapters can be used here; "
            "spp convert makes one from a HiRA adapter, or from one of the published code"
        )
    what = "pairs of SPP factors and of weights that modules_to_save or trainable_token_indices name"
    tensors, whole = split_whole(read_tensors(folder), settings, folder)
    parts = parts_by_module({_of_module(name): tensor for name, tensor in tensors.items()}, (_A, _B), folder, what)
    scale = _scale(settings, folder)
    factors = {module: Factors(A=part[_A], B=part[_B], scale=scale) for module, part in parts.items()}
    directions = settings.get("directions", 1)  # old adapters, from before there were several, lack the setting
    for module, one in check_factors(factors, folder).items():
        if not (isinstance(directions, int) and one.directions <= directions):
            raise SppError(
                f"adapter {folder}: {module} has {one.directions} directions, and adapter_config.json says "
                f"{directions!r}; the two files do not belong together"
            )
    return Adapter(factors, whole)


def tensors_of(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The tensors of an SPP adapter's file, for linear layers."""
    tensors = {}
    for module, one in factors.items():
        tensors[f"{KEY_PREFIX}{module}.{_A}"] = one.A.contiguous()
        tensors[f"{KEY_PREFIX}{module}.{_B}"] = one.B.contiguous()
    return tensors


def _of_module(name: str) -> str:
    """The name of a factor as if each stack of experts were a module."""
    return _OF_STACK.sub(r"\1.\3.\2.weight", name)


def _scale(settings: Mapping[str, Any], folder: Path) -> float:
    scale = positive(settings.get("scale"))
    if scale is None:
        raise SppError(
            f"adapter {folder}: adapter_config.json has the scale {shown(settings.get('scale'))}, but it must be a "
            "number above 0, and finite"
        )
    return scale
