"""Prune a model block by block, each one calibrated on the pruned output of those before it.

Per block: one pass that feeds the statistics of all its linear layers, the pruning, and one pass of the pruned block
that makes the inputs of the next. Beyond the model, memory holds the activations of one block boundary and the
statistics of one block. The blocks are the model's own modules, called as the model itself calls them.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spp.checkpoint import canonical_zeros
from spp.errors import SppError, UsageError, raise_problems
from spp.models import decoder_blocks, prunable_linears, weight_oi
from spp.options import Criterion
from spp.patterns import Pattern
from spp.progress import track
from spp.pruning.blocks import BlockCalls, capture
from spp.pruning.criteria import CRITERIA, Method
from spp.pruning.statistics import Statistic

logger = logging.getLogger("spp")


def prune_model(
    model: PreTrainedModel,
    pattern: Pattern,
    criterion: Criterion,
    windows: Tensor | None = None,
    *,
    skip_indivisible: bool = False,
) -> list[str]:
    """Prune every linear layer inside the decoder blocks of `model`, in place; puts it in eval mode.

    Args:
        model: a decoder-only causal LM in any float dtype; scores and statistics are fp32.
        pattern: what to keep.
        criterion: a name from `CRITERIA`.
        windows: (samples, window) int64 token ids to calibrate on; not needed for magnitude.
        skip_indivisible: leave layers dense whose input dimension the pattern does not divide.

    Returns:
        Names of the layers that were left dense.

    Raises:
        UsageError: the pattern does not fit (all layers concerned are named, and nothing is changed), no calibration
            windows, or not a decoder-only causal LM.
        SppError: NaN or infinity in weights or activations, no calibration input for a layer, or a Hessian that
            cannot be inverted; names the layer. The model is not to be used any more.
    """
    method = CRITERIA[criterion]
    prefix, blocks = decoder_blocks(model)
    linears, skipped = _split_by_fit(prunable_linears(model), pattern, skip_indivisible)
    _check_weights(linears)
    model.eval()
    with torch.no_grad():
        if method.statistic is None:
            for name, module in track(linears.items(), "pruning", total=len(linears)):
                _prune_linear(name, module, method, None, pattern)
            return skipped
        if windows is None or not windows.numel():
            raise UsageError(f"the criterion {criterion} needs calibration text")
        hidden, calls = capture(model, blocks, windows)
        for index, block in enumerate(track(blocks, "pruning")):
            mine = {name: linear for name, linear in linears.items() if name.startswith(f"{prefix}.{index}.")}
            statistics = _observe(block, calls[index], hidden, mine, method.statistic)
            for name, linear in mine.items():
                _prune_linear(name, linear, method, statistics.pop(name), pattern)
            if index + 1 < len(blocks):
                for batch in range(len(hidden)):
                    hidden[batch] = calls[index].run(block, batch, hidden[batch])
    return skipped


def _split_by_fit(
    linears: dict[str, nn.Module], pattern: Pattern, skip_indivisible: bool
) -> tuple[dict[str, nn.Module], list[str]]:
    """The layers that the pattern fits, and the names of the others; an error where these may not be skipped."""
    skipped = [name for name, module in linears.items() if not pattern.fits(weight_oi(module).shape[1])]
    if skipped and (not skip_indivisible or len(skipped) == len(linears)):
        sizes = ", ".join(f"{name} ({weight_oi(linears[name]).shape[1]})" for name in skipped)
        remedy = (
            "choose another pattern, or pass --skip-indivisible to leave these layers dense"
            if len(skipped) < len(linears)
            else "choose another pattern"
        )
        raise UsageError(
            f"pattern {pattern} does not divide the input dimension of {len(skipped)} of {len(linears)} layers: "
            f"{sizes}; {remedy}"
        )
    return {name: module for name, module in linears.items() if name not in set(skipped)}, skipped


def _check_weights(linears: dict[str, nn.Module]) -> None:
    bad = [name for name, module in linears.items() if not torch.isfinite(weight_oi(module)).all()]
    raise_problems([f"{name}: the weight holds NaN or infinity; the model is damaged" for name in bad], SppError)


def _prune_linear(name: str, module: nn.Module, method: Method, statistic: Statistic | None, pattern: Pattern) -> None:
    """Prune one layer in place."""
    value = None
    if statistic is not None:
        if not statistic.tokens:
            raise SppError(f"{name}: no calibration token reached this layer; calibrate with more samples")
        value = statistic.value()
        if not torch.isfinite(value).all():
            raise SppError(
                f"{name}: its calibration inputs hold NaN or infinity; compute in float32 or bfloat16 (--dtype), or "
                "check the model"
            )
    weight = weight_oi(module)
    try:
        pruned = method.prune(weight, value, pattern)
    except SppError as error:
        raise type(error)(f"{name}: {error}") from error
    if pruned.note:
        logger.warning("%s: %s", name, pruned.note)
    # The cast comes before the canonical zeros: a tiny negative survivor may round to -0.0.
    rounded = canonical_zeros(pruned.weight.to(weight.dtype))
    if not torch.isfinite(rounded).all():
        dtype = str(weight.dtype).removeprefix("torch.")
        raise SppError(f"{name}: an updated weight is NaN, or too large for {dtype}; compute in float32 (--dtype)")
    weight.copy_(rounded)


def _observe(
    block: nn.Module, calls: BlockCalls, hidden: list[Tensor], linears: dict[str, nn.Module], kind: type[Statistic]
) -> dict[str, Statistic]:
    """Run the dense block over all batches, and return the statistic of every linear layer's inputs."""
    statistics = {name: kind() for name in linears}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, statistic=statistics[name]: statistic.update(args[0]))
        for name, module in linears.items()
    ]
    try:
        for batch, states in enumerate(hidden):
            calls.run(block, batch, states)
    finally:
        for hook in hooks:
            hook.remove()
    return statistics
