"""Names of weights in a model's files: transformers renames many of them when it loads the files.

Adapters name modules, and files name tensors. The model's own class knows which belong together; it is built without
weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from spp.checkpoints.checkpoint import Checkpoint
from spp.errors import SppError
from spp.models.experts import stacks_in
from spp.models.loading import kind_of, load_config
from spp.models.weight_map import Part, known_parts
from spp.options import LoadingOptions

_WEIGHT = ".weight"
_from_rows_first = partial(torch.transpose, dim0=-2, dim1=-1)


@dataclass(frozen=True)
class WeightNames:
    """Where a model's files have its weights.

    Attributes:
        parts: full name of a module with a weight, or of another parameter such as a stack of experts -> the tensors in
            the files that are parts of it: almost always one. Steps to the parts of a stack begin at (E, O, I).
        transposed: full names of stacks that the model has as (E, I, O).
        tied: full name of a parameter -> that of the parameter that takes its place.
    """

    parts: dict[str, dict[str, Part]]
    transposed: frozenset[str] = frozenset()
    tied: dict[str, str] = field(default_factory=dict)


def weights_in_files(checkpoint: Checkpoint) -> WeightNames:
    """Where the files have the weights of the model that spp would load.

    Where the model's class is not known, is code of the model's own, or has no such module, modules and tensors have
    the same names.
    """
    same = {name.removesuffix(_WEIGHT): {name: Part(name)} for name in checkpoint.names}
    if (model := _skeleton(checkpoint)) is None:
        return WeightNames(same)
    parts = known_parts(model, checkpoint)
    transposed = frozenset(name for name, stack in stacks_in(model).items() if stack.transposed)
    for name in transposed & parts.keys():
        parts[name] = {
            stored: replace(part, steps=(_from_rows_first, *part.steps)) for stored, part in parts[name].items()
        }
    known = {name.removesuffix(_WEIGHT): found for name, found in parts.items() if found}
    return WeightNames(same | known, transposed, dict(model.all_tied_weights_keys))


def _skeleton(checkpoint: Checkpoint) -> PreTrainedModel | None:
    """The model that spp would load, on the meta device; None if there is no such class."""
    try:
        config = load_config(checkpoint.folder, LoadingOptions.build({}))
        kind = kind_of(checkpoint.folder, config)
    except SppError:
        return None
    try:
        with torch.device("meta"):
            return kind.from_config(config)
    except Exception:  # transformers and its models may raise anything; a model that nobody can build was not trained
        return None
