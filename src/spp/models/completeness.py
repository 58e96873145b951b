"""Whether a model's files and its configuration belong together: nothing missing, nothing that the model leaves out."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from spp.checkpoints.checkpoint import Checkpoint, is_buffer
from spp.checkpoints.safetensors_file import is_float_layout
from spp.errors import SppError
from spp.models.weight_map import require_filled, weight_map

_NUMBER = re.compile(r"\.(\d+)\.")


def check_size(config: Any, checkpoint: Checkpoint) -> None:
    """Refuse a configuration of more layers or a larger vocabulary than the files hold, before a model is built.

    Raises:
        SppError: with what both say.
    """
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return
    if layers < 1:
        raise SppError(f"{checkpoint.folder}: config.json says num_hidden_layers {layers}; a model has 1 or more")
    held = _most_layers(checkpoint.names)
    if held and layers > held:
        raise SppError(f"{checkpoint.folder}: config.json says {layers} layers, and the files hold {held}; {_REMEDY}")
    entries = sum(math.prod(layout.shape) for layout in checkpoint.layouts.values())
    tokens, features = (getattr(text, name, None) for name in ("vocab_size", "hidden_size"))
    if held and isinstance(tokens, int) and isinstance(features, int) and tokens * features > 2 * entries:
        raise SppError(
            f"{checkpoint.folder}: config.json says {tokens} tokens of {features} features, and the files hold "
            f"{entries:,} numbers in all; {_REMEDY}"
        )


def require_floats(config: Any, checkpoint: Checkpoint) -> None:
    """Refuse weights that are stored as integers or the like, which transformers would take for the numbers themselves.

    Raises:
        SppError: names one of them. Where config.json says how they are quantized, nothing is checked.
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    odd = [name for name, one in checkpoint.layouts.items() if name.endswith("weight") and not is_float_layout(one)]
    if odd:
        raise SppError(
            f"{checkpoint.folder}: {len(odd)} weights are no floats, e.g. {min(odd)}, which is stored as "
            f"{checkpoint.layouts[min(odd)].dtype}, and config.json has no quantization_config that says what the "
            "numbers mean; use the model in bf16, fp16 or fp32"
        )


_REMEDY = "they do not belong together: copy or download the model again"


def _most_layers(names: Iterable[str]) -> int:
    """The most different numbers that names have in one place, as in `model.layers.7.mlp`."""
    numbers: dict[str, set[str]] = defaultdict(set)
    for name in names:
        if match := _NUMBER.search(name):
            numbers[name[: match.start()]].add(match[1])
    return max(map(len, numbers.values()), default=0)


def require_used(model: PreTrainedModel, unexpected: Iterable[str], checkpoint: Checkpoint) -> None:
    """Refuse files with weights that the model leaves out, which would otherwise be dropped without a word.

    Args:
        model: built from the checkpoint's configuration.
        unexpected: names of tensors in the files that it does not use.
        checkpoint: the files.

    Raises:
        SppError: some are more than buffers, tied copies, or what transformers ignores in this family, too.
    """
    if checkpoint.config.get("model_type") != model.config.model_type:
        return  # the files are of a model that also takes images, and this is its language model alone
    if dropped := [name for name in unexpected if not _is_harmless(model, name)]:
        raise SppError(
            f"model {str(checkpoint.folder)!r} has {len(dropped)} weights that config.json leaves out, e.g. "
            f"{sorted(dropped)[0]}; correct the numbers in config.json, or remove the weights"
        )


def require_whole(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Refuse files that lack a weight of the model, or hold more than it uses, from their names alone.

    Args:
        model: built from the checkpoint's configuration; may be on the meta device.
        checkpoint: the files.

    Raises:
        SppError: names one weight that is missing, or left out.
    """
    parts = weight_map(model, checkpoint)
    left = [name for name in checkpoint.names if name not in parts and not _is_harmless(model, name)]
    filled = {part.parameter for part in parts.values()}
    names = [name for name, _ in model.named_parameters()]  # tied parameters once, under their first name
    if not left:
        require_filled(parts, names, checkpoint)
    elif filled.issuperset(names):  # else a tensor that is left may be converted to what seems to be lacking
        require_used(model, left, checkpoint)


def _is_harmless(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor may be in the files, and the model does not use it."""
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    tied = model.all_tied_weights_keys
    return is_buffer(name) or name in tied or any(pattern.search(name) for pattern in ignored)
