"""Weights that an adapter holds as they became, without factors: PEFT trains these whole, whatever the method.

MODULE.weight                                          modules_to_save, and embeddings of another size than the base's
EMBEDDING.token_adapter.trainable_tokens_delta (n, I)  the new values of the rows in trainable_token_indices
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import EMBEDDING_LAYER_NAMES
from torch import Tensor

from spp.adapters.factors import KEY_PREFIX
from spp.errors import SppError
from spp.ops.zeros import all_finite, is_float
from spp.options import is_one_of

_ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Whole:
    """What a weight becomes.

    Attributes:
        values: the new weight, or new rows of it.
        rows: numbers of these rows; None if `values` is all of it.
    """

    values: Tensor
    rows: Tensor | None = None

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the weight that it fits, which may be `before`."""
        if self.rows is None:
            return tuple(self.values.shape)
        if before and int(self.rows.max()) < before[0]:
            return (before[0], *self.values.shape[1:])
        return tuple(self.values.shape)

    def applied(self, before: Tensor) -> Tensor:
        """The new weight, in the dtype of the old one."""
        values = self.values.to(before.dtype)
        return values if self.rows is None else before.index_copy(0, self.rows, values)


def split_whole(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Tensor], dict[str, Whole]]:
    """An adapter's tensors without those that were trained whole, and the latter by the names of weights in the model.

    Raises:
        SppError: one of the latter is not of floats, holds NaN or infinity, or has no row numbers in the settings.
    """
    saved = settings.get("modules_to_save")
    modules = [one for one in saved if isinstance(one, str)] if isinstance(saved, list) else []
    others: dict[str, Tensor] = {}
    whole: dict[str, Whole] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(KEY_PREFIX)
        if name.endswith(_ROWS):
            module = name.removesuffix(_ROWS)
            whole[f"{module}.weight"] = Whole(tensor, _rows(settings, module, len(tensor), folder))
        elif _is_inside(name, modules) or is_one_of(name.removesuffix(".weight"), EMBEDDING_LAYER_NAMES):
            whole[name] = Whole(tensor)
        else:
            others[key] = tensor
    for name, one in whole.items():
        if not (is_float(one.values) and all_finite(one.values)):
            raise SppError(
                f"adapter {folder}: {name}, which was trained whole, holds NaN or infinity, or no floats "
                f"({one.values.dtype}); the training was ruined, or the file is damaged"
            )
    return others, whole


def _is_inside(name: str, modules: list[str]) -> bool:
    """Whether a tensor is in one of some modules, which are named by the ends of their names, as in PEFT."""
    parts = name.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts))]
    return any(module.endswith(end) for module in around for end in modules)


def _rows(settings: Mapping[str, Any], module: str, count: int, folder: Path) -> Tensor:
    """The numbers of an embedding's trained rows, from the adapter's settings."""
    given = settings.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((rows for name, rows in given.items() if is_one_of(module, [name])), None)
    numbers = given if isinstance(given, list) and all(isinstance(one, int) and one >= 0 for one in given) else []
    if not count or len(numbers) != count:
        raise SppError(
            f"adapter {folder}: it has {count} trained rows of {module}, and trainable_token_indices in "
            f"adapter_config.json names {len(numbers)}; the two files do not belong together"
        )
    return torch.tensor(numbers)
