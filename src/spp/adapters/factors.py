"""Read adapters of any format from disk: their settings, their tensors, and the factors A and B.

Shapes: E experts, O output features, I input features, R row groups, K directions.
"""

from __future__ import annotations

import math
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from spp.checkpoints.json_files import read_object
from spp.errors import SppError, UsageError, raise_problems
from spp.ops import merged_weight
from spp.ops.reference import MOST_DIRECTIONS
from spp.ops.zeros import all_finite, is_float
from spp.runtime.files import reading

SETTINGS, WEIGHTS, PICKLED_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KEY_PREFIX = "base_model.model."
"""The prefix that PEFT puts before the name of a module in the model."""


@dataclass(frozen=True)
class Factors:
    """The trained factors of one weight: `A` (R K, I), `B` (O, K) and the scale s.

    Those of a stack of experts are (E, R K, I) and (E, O, K).
    """

    A: Tensor
    B: Tensor
    scale: float

    @property
    def directions(self) -> int:
        """K."""
        return self.B.shape[-1]

    @property
    def groups(self) -> int:
        """R."""
        return self.A.shape[-2] // self.directions

    @property
    def of_experts(self) -> bool:
        """Whether they are those of a stack of experts."""
        return self.A.ndim == 3

    def __getitem__(self, expert: int) -> Factors:
        """The factors of one expert of a stack."""
        return Factors(A=self.A[expert], B=self.B[expert], scale=self.scale)

    @classmethod
    def stack(cls, experts: Sequence[Factors]) -> Factors:
        """The factors of a stack, from those of its experts."""
        A, B = (torch.stack([getattr(one, name) for one in experts]) for name in ("A", "B"))
        return cls(A=A, B=B, scale=experts[0].scale)

    def stored_shape(self, transposed: bool) -> tuple[int, ...]:
        """Shape of the weight that the factors fit: (O, I), or (I, O) if stored transposed; a stack has E, too."""
        out_features, in_features = self.B.shape[-2], self.A.shape[-1]
        return (*self.A.shape[:-2], *((in_features, out_features) if transposed else (out_features, in_features)))

    def merge(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """W' = W + s * W * (A[g] B) (paper, eq. 5), in fp32, rounded once to W's dtype or another; zeros are +0.0."""
        if not self.of_experts:
            return merged_weight(weight, self.A, self.B, self.scale, dtype)
        out = torch.empty(weight.shape, dtype=dtype or weight.dtype)
        for expert, one in enumerate(weight):
            out[expert] = self[expert].merge(one, dtype)
        return out


def check_factors(factors: Mapping[str, Factors], folder: Path) -> dict[str, Factors]:
    """Return `factors` if the shapes and dtypes of all of them are valid.

    Raises:
        SppError: names every module whose factors are not.
    """
    problems = []
    for module, one in factors.items():
        A, B = tuple(one.A.shape), tuple(one.B.shape)
        if not (len(A) == len(B) in (2, 3) and A[:-2] == B[:-2] and 0 not in (*A, *B) and _fit(A[-2], *B[-2:])):
            problems.append(f"{module}: A is {A} and B is {B}, where (R K, I) and (O, K) with R K <= O are expected")
        elif not (is_float(one.A) and is_float(one.B)):
            problems.append(f"{module}: A is {one.A.dtype} and B is {one.B.dtype}, and only floats are factors")
        elif not (all_finite(one.A) and all_finite(one.B)):
            problems.append(f"{module}: A or B holds NaN or infinity; the training was ruined, or the file is damaged")
    raise_problems([f"adapter {folder}: {problem}" for problem in problems], SppError)
    return dict(factors)


def _fit(rows: int, out_features: int, directions: int) -> bool:
    """Whether A with so many rows fits B (O, K)."""
    return 0 < directions <= MOST_DIRECTIONS and rows <= out_features and rows % directions == 0


def read_settings(folder: Path) -> dict[str, Any]:
    """An adapter's adapter_config.json.

    Raises:
        UsageError: there is no such folder or file.
        SppError: it is not a JSON object.
    """
    if not folder.is_dir():
        raise UsageError(f"adapter {folder}: no such folder")
    return read_object(folder / SETTINGS)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's safetensors file.

    Raises:
        UsageError: it is missing.
        SppError: it is truncated or damaged.
    """
    path = folder / WEIGHTS
    if not path.exists():
        raise UsageError(f"adapter {folder}: {WEIGHTS} is missing")
    with reading(path, "a whole safetensors file"):
        return load_file(path)


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, which is a pickle; no code in it is run (`weights_only`).

    Raises:
        SppError: it is truncated or damaged, it asks for code to be run, or it holds more than tensors.
    """
    try:
        with reading(path, "a whole file of tensors"):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except SppError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError) and "GLOBAL" in str(error.__cause__):
            raise SppError(
                f"{path} asks for code to be run when it is read, which is refused: weights need none. Nothing of it "
                "was run. Get the adapter from a source that you trust, or as safetensors"
            ) from error
        raise
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise SppError(f"{path} holds more than named tensors; only a state dict is read")
    return held


def positive(value: Any) -> float | None:
    """A number from a settings file as a float; None unless it is one above 0 that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if 0 < number < math.inf else None


def parts_by_module(
    tensors: Mapping[str, Tensor], suffixes: Iterable[str], folder: Path, what: str
) -> dict[str, dict[str, Tensor]]:
    """Group tensors by module: module name -> suffix -> tensor.

    Every module must have one tensor for each suffix, and there must be no other tensors.

    Args:
        tensors: the tensors of the file.
        suffixes: the endings that their names have.
        folder, what: the adapter's folder and what it should hold, for the error.

    Raises:
        SppError: tensors are missing, or are no factors; it names one.
    """
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    odd = []
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in suffixes if name.endswith(f".{suffix}")), None)
        if suffix is None:
            odd.append(name)
        else:
            parts[name.removesuffix(f".{suffix}").removeprefix(KEY_PREFIX)][suffix] = tensor
    missing = [f"{module}.{suffix}" for module, found in parts.items() for suffix in suffixes if suffix not in found]
    problems = []
    if not parts:
        problems.append("it holds no factors at all")
    if missing:
        problems.append(f"it lacks {len(missing)} tensors, e.g. {min(missing)}")
    if odd:
        problems.append(f"it holds {len(odd)} tensors that are no factors, e.g. {min(odd)}")
    raise_problems([f"adapter {folder} does not consist of {what}: {problem}" for problem in problems], SppError)
    return {module: parts[module] for module in sorted(parts)}
