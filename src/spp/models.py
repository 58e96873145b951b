"""All knowledge about architectures: where the decoder blocks are, and which weights in them are pruned.

Found on the model itself, so that no architecture is copied and new ones work: the decoder blocks are the one
outermost list of `num_hidden_layers` modules in the decoder, the prunable weights are the linear layers inside.
Embeddings, the head, norms, and projections around the blocks (OPT's project_in / project_out) are outside.

Shapes: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spp.checkpoint import is_float
from spp.errors import UsageError
from spp.packed_linear import PackedLinear


def decoder_blocks(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """The decoder blocks of a decoder-only causal LM, in order.

    Returns:
        The full name of the list that holds them (`model.layers`, `transformer.h`), and the blocks.

    Raises:
        UsageError: the model is no decoder-only causal LM, or its blocks cannot be told.
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder or not model.can_generate():
        raise UsageError(
            f"{kind} is not a decoder-only causal language model; give one that AutoModelForCausalLM loads"
        )
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = _outermost_lists(model.get_decoder())
    found = [modules for modules in lists if len(modules) == count]
    if len(found) != 1:
        raise UsageError(
            f"{kind}: the decoder blocks cannot be told: {len(found)} module lists have num_hidden_layers = {count} "
            f"entries, and one is expected (lengths seen: {[len(modules) for modules in lists]})"
        )
    name = next(name for name, module in model.named_modules() if module is found[0])
    return name, list(found[0])


def _outermost_lists(module: nn.Module) -> list[nn.ModuleList]:
    """Module lists that are not inside another one (a block's experts are a list, too)."""
    lists: list[nn.ModuleList] = []
    for child in module.children():
        lists += [child] if isinstance(child, nn.ModuleList) else _outermost_lists(child)
    return lists


def prunable_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Full module name -> linear layer (`nn.Linear`, GPT-2's `Conv1D`, `PackedLinear`) in the decoder blocks, in order.

    Raises:
        UsageError: see `decoder_blocks`; or the weights are quantised.
    """
    prefix, blocks = decoder_blocks(model)
    linears: dict[str, nn.Module] = {
        f"{prefix}.{index}.{name}": module
        for index, block in enumerate(blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D | PackedLinear)
    }
    for name, module in linears.items():
        if not isinstance(module, PackedLinear) and not is_float(weight_oi(module)):
            dtype = str(weight_oi(module).dtype).removeprefix("torch.")
            raise UsageError(f"{name}: the weight is quantised ({dtype}); give the model as it was before quantisation")
    if not linears:
        raise UsageError(f"{type(model).__name__}: there is no linear layer in its decoder blocks")
    return linears


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight as (I, O), as GPT-2's Conv1D does, or stands for one that did."""
    return module.transposed if isinstance(module, PackedLinear) else isinstance(module, Conv1D)


def weight_oi(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (O, I): a view, so that writing to it changes the layer; no gradient.

    Raises:
        UsageError: the layer is packed, so that there is nothing to view.
    """
    if isinstance(module, PackedLinear):
        raise UsageError("the weight is packed; unpack the model first (spp.unpack_)")
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight


def sparsity(modules: Iterable[nn.Module]) -> float:
    """Share of zeros over the weights of linear layers; an entry that a packed layer keeps is no zero."""
    counts = [_count_zeros(module) for module in modules]
    return sum(zeros for zeros, _ in counts) / sum(entries for _, entries in counts)


def _count_zeros(module: nn.Module) -> tuple[int, int]:
    """Zeros and entries of a layer's weight."""
    if isinstance(module, PackedLinear):
        entries = module.out_features * module.in_features
        return entries - module.values.numel(), entries
    weight = weight_oi(module)
    return int((weight == 0).sum()), weight.numel()


def unreached_weights(model: PreTrainedModel) -> list[str]:
    """Names of parameters in the decoder blocks that hold several matrices at once, so that they are never pruned.

    Mixture-of-experts layers keep their experts as one parameter of three dimensions.
    """
    prefix, blocks = decoder_blocks(model)
    return [
        f"{prefix}.{index}.{name}"
        for index, block in enumerate(blocks)
        for name, parameter in block.named_parameters()
        if parameter.ndim > 2
    ]
