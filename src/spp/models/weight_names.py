"""Names of weights in a model's files: transformers renames many of them when it loads the files.

Adapters name modules, and files name tensors. The model's own class knows which belong together; it is built without
weights.
"""

from __future__ import annotations

import torch

from spp.checkpoints.checkpoint import Checkpoint
from spp.errors import SppError
from spp.models.loading import kind_of, load_config
from spp.models.weight_map import Part, known_parts
from spp.options import LoadingOptions

_WEIGHT = ".weight"


def weights_in_files(checkpoint: Checkpoint) -> dict[str, dict[str, Part]]:
    """Full name of a module -> the tensors in the files that are its weight: almost always one, or else its parts.

    Where the model's class is not known, is code of the model's own, or has no such module, modules and tensors have
    the same names.
    """
    tensors = (name for name in checkpoint.names if name.endswith(_WEIGHT))
    same = {name.removesuffix(_WEIGHT): {name: Part(name)} for name in tensors}
    known = _known_to_its_class(checkpoint).items()
    return same | {name.removesuffix(_WEIGHT): parts for name, parts in known if name.endswith(_WEIGHT)}


def _known_to_its_class(checkpoint: Checkpoint) -> dict[str, dict[str, Part]]:
    """`known_parts` of the model that spp would load; empty if there is no such class."""
    try:
        config = load_config(checkpoint.folder, LoadingOptions.build({}))
        kind = kind_of(checkpoint.folder, config)
    except SppError:
        return {}
    try:
        with torch.device("meta"):
            model = kind.from_config(config)
    except Exception:  # transformers and its models may raise anything; a model that nobody can build was not trained
        return {}
    return known_parts(model, checkpoint)
