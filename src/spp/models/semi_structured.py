"""2:4 layers on NVIDIA's sparse tensor cores, through torch's own `torch.sparse.to_sparse_semi_structured`.

For inference: a weight is replaced by its non-zeros and their positions, which the hardware multiplies at up to twice
the dense rate if a product is large enough to be bound by arithmetic.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spp.errors import SppError, UsageError
from spp.models.packed_linear import PackedLinear
from spp.ops.dtypes import dtype_name
from spp.patterns import NM

_PATTERN = NM(2, 4)
_DTYPES = (torch.float16, torch.bfloat16)
_MULTIPLES = (32, 64)
"""O and I must be multiples of it: CUTLASS requires that; cuSPARSELt, torch's other back-end, only 16."""
_CAPABILITY = (8, 0)  # Ampere, the first with sparse tensor cores


@dataclass(frozen=True, kw_only=True)
class SemiStructuredReport:
    """The result of `to_semi_structured`.

    Attributes:
        converted: names of the converted layers.
        skipped: name of every other linear layer -> why it was not converted.
    """

    converted: list[str]
    skipped: dict[str, str]


def to_semi_structured(model: nn.Module) -> SemiStructuredReport:
    """Convert the weight of every linear layer that is exactly 2:4 for the sparse tensor cores, in place.

    The new weights get no gradient, and `save_pretrained` cannot save them: save the model first.

    Args:
        model: on a CUDA device, in fp16 or bf16.

    Returns:
        Which layers were converted, and why the others were not.

    Raises:
        UsageError: there is no CUDA device with sparse tensor cores, the model is not on one, or it has no layer that
            can be converted; nothing is changed.
        SppError: torch cannot convert a layer; the layers before it are converted.
    """
    _require_sparse_tensor_cores(model)
    skipped = unsuitable(model)
    converted = [name for name in _linears(model) if name not in skipped]
    for name in converted:
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(_compressed(layer.get_parameter("weight").detach(), name), requires_grad=False)
    return SemiStructuredReport(converted=converted, skipped=skipped)


def unsuitable(model: nn.Module) -> dict[str, str]:
    """Name of every linear layer that cannot be converted -> why; on any device.

    Raises:
        UsageError: no layer can be converted.
    """
    users = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    linears = _linears(model)
    found = {name: why for name, layer in linears.items() if (why := _objection(name, layer, users))}
    if len(found) == len(linears):
        first = next((f"; {name}, for one, {why}" for name, why in found.items()), ", because it has none")
        raise UsageError(f"no linear layer of this {type(model).__name__} can be semi-structured{first}")
    return found


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    kinds = nn.Linear | Conv1D | PackedLinear
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _objection(name: str, layer: nn.Module, users: Counter[int]) -> str | None:
    """Why a layer cannot be converted, or None; the pattern, which takes longest to check, comes last."""
    if isinstance(layer, PackedLinear):
        return "is packed; call spp.unpack_ first"
    if not isinstance(layer, nn.Linear):
        return f"is a {type(layer).__name__}, whose weight lies transposed"
    if name.endswith("base_layer"):
        return "has an adapter; merge it first"
    weight = layer.weight
    if weight.dtype not in _DTYPES:
        dtype = dtype_name(weight.dtype)
        return f"is {dtype}, and sparse tensor cores take float16 and bfloat16; call model.to(torch.bfloat16) first"
    if any(size % multiple for size, multiple in zip(weight.shape, _MULTIPLES, strict=True)):
        return f"is {tuple(weight.shape)}, and multiples of {_MULTIPLES} are taken"
    if users[id(weight)] > 1:
        return "shares its weight with another module"
    if violations := _PATTERN.violations(weight.detach()):
        return f"is not {_PATTERN}: {violations:,} groups of 4 have more than 2 non-zeros"
    return None


def _require_sparse_tensor_cores(model: nn.Module) -> None:
    needs = "2:4 products need an NVIDIA GPU of compute capability 8.0 or above"
    if not torch.cuda.is_available():
        raise UsageError(f"{needs}, and torch sees no CUDA device here; on a CPU, use spp.pack_")
    devices = {parameter.device for parameter in model.parameters()}
    if elsewhere := [device for device in devices if device.type != "cuda"]:
        raise UsageError(f'{needs}, and this model has parameters on {elsewhere[0]}; call model.to("cuda") first')
    for device in devices:
        if (found := torch.cuda.get_device_capability(device)) < _CAPABILITY:
            raise UsageError(f"{needs}, and {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}")


def _compressed(weight: Tensor, name: str) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor")
            return torch.sparse.to_sparse_semi_structured(weight.contiguous())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise SppError(f"{name}: torch cannot make it semi-structured ({str(error).splitlines()[0]})") from error
