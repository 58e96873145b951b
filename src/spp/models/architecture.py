"""All knowledge about architectures: where the decoder blocks are, and which weights in them are pruned.

Both are found on the model itself, so no architecture is described here, and new ones work. The decoder blocks are the
only outermost list of `num_hidden_layers` modules in the decoder. The linear layers inside them are pruned, and so are
the matrices of experts that are stored in one parameter. Embeddings, the head, norms, projections around the blocks
(OPT's project_in / project_out) and a vision tower are outside the blocks.

Routers stay dense, as in Wanda's and SparseGPT's work on Mixtral: they are small, and a wrong choice of experts costs
more than a pruned expert. A router is a linear layer beside the experts, or the only one in a module beside them, with
one output per expert or a single output (the gate of a shared expert). In most families, routers are not linear layers.

Shapes: E experts, O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from spp.errors import UsageError
from spp.models.bypassed import bypassed, is_for_images
from spp.models.experts import stacks_of
from spp.models.packed_linear import PackedLinear
from spp.ops.dtypes import dtype_name
from spp.ops.zeros import is_float

AutoClass = type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]

# Families whose causal LM is the language model alone, and does not read the files of the whole (transformers 5.17).
_READ_AS_A_WHOLE = frozenset({"emu3"})


def auto_class(config: Any) -> AutoClass | None:
    """The class that loads a decoder-only model of this configuration: a causal LM, or one that also takes images.

    None if there is no such class.
    """
    own_code = getattr(config, "auto_map", None) or {}
    as_a_whole = config.model_type in _READ_AS_A_WHOLE
    if (type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not as_a_whole) or AutoModelForCausalLM.__name__ in own_code:
        return AutoModelForCausalLM
    takes_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if (takes_images or AutoModelForImageTextToText.__name__ in own_code) and not config.is_encoder_decoder:
        return AutoModelForImageTextToText
    return None


def decoder_blocks(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """The decoder blocks of a decoder-only causal LM, or of the language model in one that also takes images.

    Returns:
        The full name of the list that holds them (`model.layers`, `transformer.h`), and the blocks in order.

    Raises:
        UsageError: the model is not a decoder-only causal LM, or its blocks cannot be identified.
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder or not model.can_generate():
        raise UsageError(
            f"{kind} is not a decoder-only causal language model; give one that AutoModelForCausalLM or "
            "AutoModelForImageTextToText loads"
        )
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    decoder = model.get_decoder()
    lists = _outermost_lists(decoder)
    named = {module: name for name, module in model.named_modules()}
    names = {named[modules]: modules for modules in lists}
    found = {name: modules for name, modules in names.items() if len(modules) == count}
    if len(found) != 1:
        seen = ", ".join(f"{name} with {len(modules)}" for name, modules in names.items()) or "none"
        raise UsageError(
            f"{kind}: the decoder blocks cannot be told: exactly one module list of num_hidden_layers = {count} "
            f"entries is looked for in its decoder, a {type(decoder).__name__}, and {len(found)} are there; lists "
            f"seen: {seen}"
        )
    ((name, blocks),) = found.items()
    return name, list(blocks)


def _outermost_lists(module: nn.Module) -> list[nn.ModuleList]:
    """Module lists that are not inside another module list (the experts of a block are a list, too)."""
    lists: list[nn.ModuleList] = []
    for child in module.children():
        lists += [child] if isinstance(child, nn.ModuleList) else _outermost_lists(child)
    return lists


@dataclass(frozen=True)
class Matrix:
    """A weight matrix that is pruned.

    Attributes:
        name: name of the linear layer (`model.layers.0.mlp.up_proj`); for a matrix of an expert in a stack, the name
            that its layer would have (`model.layers.0.mlp.experts.3.gate_proj`, `.up_proj`, `.down_proj`).
        weight: (O, I), a view: writing to it changes the model; no gradient.
        owner: the module that holds the parameter.
        parameter: its name there (`weight`, `gate_up_proj`).
        expert: index in a stack of experts; None for a linear layer.
    """

    name: str
    weight: Tensor
    owner: nn.Module
    parameter: str
    expert: int | None = None


def prunable_matrices(prefix: str, block: nn.Module) -> list[Matrix]:
    """The prunable weight matrices of one decoder block, in the order of its modules; also on the meta device.

    Args:
        prefix: the block's full name (`model.layers.0`).
        block: a block whose layers are dense (see `spp.unpack_`).

    Raises:
        UsageError: a layer is packed.
    """
    linears = _linears(block)
    matrices: list[Matrix] = []
    for name, module in block.named_modules(prefix=prefix):
        if module in linears:
            matrices.append(Matrix(name, weight_oi(module), module, "weight"))
        for parameter, stack in _stacks(module).items():
            matrices += _matrices_of_experts(name, module, parameter, stack.detach())
    return matrices


def _matrices_of_experts(name: str, owner: nn.Module, parameter: str, stack: Tensor) -> list[Matrix]:
    """The matrices in one parameter (E, O, I) of the experts `name`; gate_up_proj is (E, 2 * O, I), gates first."""
    parts = {parameter: stack}
    if parameter == "gate_up_proj":
        parts = dict(zip(("gate_proj", "up_proj"), stack.chunk(2, dim=1), strict=True))
    return [
        Matrix(f"{name}.{expert}.{part}", weights[expert], owner, parameter, expert)
        for expert in range(len(stack))
        for part, weights in parts.items()
    ]


def _stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters (E, O, I) of experts that are computed as `linear(x, parameter[expert])`, by name.

    Only one layout is accepted here: gates before ups, and outputs before inputs. All modules with it compute that way
    in their own forward, which the implementation `eager` runs.
    """
    if not getattr(module, "is_concatenated", False):
        return {}
    return {name: module.get_parameter(name) for name, stack in stacks_of(module).items() if not stack.transposed}


def _linears(block: nn.Module) -> dict[nn.Module, str]:
    """Linear layer -> its name, for all linear layers of a block except routers."""
    linears = {module: name for name, module in block.named_modules() if _is_linear(module)}
    routers = {router for module in block.modules() for router in _routers(module)}
    return {module: name for module, name in linears.items() if module not in routers}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D | PackedLinear)


def _routers(module: nn.Module) -> list[nn.Module]:
    """The routers of the experts that are direct children of a module; see the top of this file."""
    counts = {child: _count_experts(child) for child in module.children()}
    beside = [child for child, count in counts.items() if not count]
    if len(beside) == len(counts):
        return []
    inside = [[layer for layer in child.modules() if _is_linear(layer)] for child in beside]
    only = [layers[0] for layers in inside if len(layers) == 1]
    return [layer for layer in only if _out_features(layer) in {1, *counts.values()}]


def _count_experts(module: nn.Module) -> int:
    """How many experts a module holds, as one parameter or as a list; 0 if it holds none."""
    if isinstance(module, nn.ModuleList):
        return len(module)
    stacks = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
    return len(stacks[0]) if len(stacks) > 1 else 0


def _out_features(module: Any) -> int:
    """O of a linear layer."""
    return module.nf if isinstance(module, Conv1D) else module.out_features


def prunable_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Full module name -> linear layer (`nn.Linear`, GPT-2's `Conv1D`, `PackedLinear`) in the decoder blocks, in order.

    These are the layers that can be packed and get adapters. Routers are left out, and what only `prunable_matrices`
    returns: experts that are stored in one parameter, and the layers of `bypassed_linears`.

    Raises:
        UsageError: see `decoder_blocks`; or the weights are quantized.
    """
    linears = {name: module for name, module, why in _linears_of_blocks(model) if why is None}
    for name, module in linears.items():
        if not isinstance(module, PackedLinear) and not is_float(weight_oi(module)):
            dtype = dtype_name(weight_oi(module).dtype)
            raise UsageError(f"{name}: the weight is quantized ({dtype}); give the model as it was before quantization")
    if not linears:
        raise UsageError(f"{type(model).__name__}: there is no linear layer in its decoder blocks")
    return linears


def bypassed_linears(model: PreTrainedModel) -> dict[str, str]:
    """Full name of each linear layer in the blocks that neither an adapter nor a packed weight suits -> why."""
    return {name: why for name, _, why in _linears_of_blocks(model) if why is not None}


def linears_for_images(model: PreTrainedModel) -> dict[str, str]:
    """Full name of each linear layer in the blocks that the model does not call on text -> why."""
    prefix, blocks = decoder_blocks(model)
    unused = [f"{prefix}.{index}." for index, block in enumerate(blocks) if is_for_images(block)]
    names = [name for name, _, _ in _linears_of_blocks(model) if name.startswith(tuple(unused))]
    return dict.fromkeys(names, "the model does not call its block on text")


def _linears_of_blocks(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Full name of each linear layer in the blocks, the layer, and why neither adapter nor packed weight suits it."""
    prefix, blocks = decoder_blocks(model)
    for index, block in enumerate(blocks):
        reasons = bypassed(block)
        for module, name in _linears(block).items():
            yield f"{prefix}.{index}.{name}", module, reasons.get(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight as (I, O), as GPT-2's Conv1D does, or replaces a layer that did."""
    return module.transposed if isinstance(module, PackedLinear) else isinstance(module, Conv1D)


def weight_oi(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (O, I): a view, so that writing to it changes the layer; no gradient.

    Raises:
        UsageError: the layer is packed, so there is no dense weight.
    """
    if isinstance(module, PackedLinear):
        raise UsageError("the weight is packed; unpack the model first (spp.unpack_)")
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight


def shape_oi(module: nn.Module) -> tuple[int, int]:
    """The shape (O, I) of a linear layer's weight, dense, packed or quantized."""
    if isinstance(module, nn.Linear | PackedLinear):
        return module.out_features, module.in_features
    out_features, in_features = weight_oi(module).shape
    return out_features, in_features


def sparsity(modules: Iterable[nn.Module], stacks: Iterable[Tensor] = ()) -> float:
    """Share of zeros over the weights of linear layers, and over stacks of experts' matrices.

    All values that a packed layer stores count as non-zero.
    """
    counts = [_count_zeros(module) for module in modules]
    counts += [(int((one == 0).count_nonzero()), one.numel()) for stack in stacks for one in stack]
    return sum(zeros for zeros, _ in counts) / sum(entries for _, entries in counts)


def _count_zeros(module: nn.Module) -> tuple[int, int]:
    """Number of zeros and of entries in a layer's weight."""
    if isinstance(module, PackedLinear):
        entries = module.out_features * module.in_features
        return entries - module.values.numel(), entries
    weight = weight_oi(module)
    return int((weight == 0).count_nonzero()), weight.numel()


def unreached_weights(model: PreTrainedModel) -> list[str]:
    """Names of parameters with three or more dimensions in the decoder blocks that are never pruned.

    Most mixtures of experts store their experts as such parameters. These are not computed as
    `linear(x, parameter[expert])`, or are no experts, but kernels of convolutions.
    """
    prefix, blocks = decoder_blocks(model)
    return [
        f"{name}.{parameter}"
        for index, block in enumerate(blocks)
        for name, module in block.named_modules(prefix=f"{prefix}.{index}")
        for parameter, value in module.named_parameters(recurse=False)
        if value.ndim > 2 and parameter not in _stacks(module)
    ]
