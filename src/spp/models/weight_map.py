"""Map each tensor in a model's files to a part of a parameter, so that a block can be read and written on its own.

transformers renames and joins tensors when it loads them: the files of a mixture of experts hold each expert's
matrices, the model one parameter with all of them. This module applies transformers' own rules to names and shapes,
without data, so that no architecture is described twice. The joined tensors become views of the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from spp.checkpoints.checkpoint import Checkpoint
from spp.errors import SppError
from spp.models.architecture import decoder_blocks

_View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """The part of a parameter that a tensor in the files becomes.

    Attributes:
        parameter: full name of the parameter or buffer.
        steps: from the parameter to the part, each one a view.
    """

    parameter: str
    steps: tuple[_View, ...] = ()

    def view(self, parameter: Tensor) -> Tensor:
        """A view of the part of `parameter`, in the shape that the tensor has in the files."""
        return reduce(lambda tensor, step: step(tensor), self.steps, parameter)

    def rows(self, shape: Sequence[int]) -> tuple[Tensor, bool] | None:
        """The rows of a matrix (O, I), or of a stack (E, O, I), that the part is made of; None if it is not whole rows.

        Returns:
            Their numbers, (n,) or (E', n), counted through all matrices of the stack; and whether the part has them as
            columns.
        """
        *outer, in_features = shape
        numbers = torch.arange(math.prod(outer)).reshape(*outer, 1).expand(*outer, in_features)
        seen = self.view(numbers)  # views keep the expanded dimension's stride, 0
        for dim, transposed in ((-1, False), (-2, True)):
            if seen.ndim > 1 and seen.stride(dim) == 0 and seen.shape[dim] == in_features:
                return seen.select(dim, 0), transposed
        return None


def weight_map(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Part]:
    """Name of a tensor in the files -> the part of a parameter that it becomes.

    Tensors that the model does not use (rotary frequencies in old files, extra heads) are left out. So are tensors
    outside the decoder blocks that transformers converts in a way that is not a view.

    Args:
        model: built from the checkpoint's configuration; may be on the meta device.
        checkpoint: the model's files, dense or packed.

    Raises:
        UsageError: as `decoder_blocks`.
        SppError: a tensor's shape differs from the configuration's, or a tensor of a decoder block is converted on
            loading in a way that is not a view.
    """
    inside = f"{decoder_blocks(model)[0]}."
    parts: dict[str, Part] = {}
    for target, shape, group, found in _parts_of_groups(model, checkpoint):
        if found is not None:
            parts |= found
        elif target.startswith(inside) or not group.operations:
            raise SppError(f"{checkpoint.folder}: {group.misfit(target, shape)}")
    return _under_first_names(parts, model)


def known_parts(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, dict[str, Part]]:
    """Full name of a parameter -> the tensors in the files that are its parts.

    As `weight_map`, for a model of any class, and without its demands: a parameter that the files lack, or hold in
    another shape or in a way that is not a view, is left out.
    """
    return {target: parts for target, _, _, parts in _parts_of_groups(model, checkpoint) if parts is not None}


def _parts_of_groups(
    model: PreTrainedModel, checkpoint: Checkpoint
) -> Iterator[tuple[str, torch.Size, _Group, dict[str, Part] | None]]:
    """Each parameter that the files have something for: name, shape, tensors, and their parts; None if not views."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for target, group in _groups(model, checkpoint, shapes).items():
        joined = group.join(shapes[target])
        fits = joined is not None and joined.shape == shapes[target]
        parts = {name: Part(target, steps) for name, steps in joined.leaves.items()} if joined and fits else None
        yield target, shapes[target], group, parts


def require_filled(parts: Mapping[str, Part], parameters: Iterable[str], checkpoint: Checkpoint) -> None:
    """Check that the files have a value for each of some parameters.

    Args:
        parts: from `weight_map`.
        parameters: full names; of tied parameters the first name in `named_parameters()`.
        checkpoint: the files.

    Raises:
        SppError: values are missing; it says how many, and names one parameter.
    """
    filled = {part.parameter for part in parts.values()}
    if lacking := sorted(set(parameters) - filled):
        raise SppError(
            f"model {str(checkpoint.folder)!r} lacks {len(lacking)} weights, e.g. {lacking[0]}; the checkpoint is "
            "incomplete"
        )


def _under_first_names(parts: dict[str, Part], model: PreTrainedModel) -> dict[str, Part]:
    """The parts, with tied parameters under their first name if the files hold them under another one only."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    filled = {part.parameter for part in parts.values()}
    renamed = {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] not in filled}
    return {name: replace(part, parameter=renamed.get(part.parameter, part.parameter)) for name, part in parts.items()}


@dataclass(frozen=True)
class _Joined:
    """A tensor made of tensors of the files: its shape, and for each of those the steps to its view."""

    shape: torch.Size
    leaves: dict[str, tuple[_View, ...]]


_Found = dict[str, list[_Joined]]
"""Pattern of a transformers rule -> the tensors that it matches, in the order in which they are joined."""


@dataclass
class _Group:
    """The tensors of the files that are joined into one parameter.

    Attributes:
        operations: transformers' operations on them; empty if they are only renamed.
        patterns: the rule's patterns, in the order in which their tensors are joined.
        targets: number of parameters that they become.
        found: the tensors.
    """

    operations: list[ConversionOps]
    patterns: list[str]
    targets: int = 1
    found: _Found = field(default_factory=dict)

    def join(self, shape: torch.Size) -> _Joined | None:
        """The joined tensor, which must have this shape; None if the tensors are not views of it."""
        found: _Found | None = {pattern: self.found[pattern] for pattern in self.patterns if pattern in self.found}
        for operation in self.operations:
            join = _JOINS.get(type(operation))
            found = join(operation, found, shape) if join and self.targets == 1 else None
            if not found:
                return None
        joined = [tensor for tensors in found.values() for tensor in tensors]
        return joined[0] if len(joined) == 1 else None

    def misfit(self, target: str, shape: torch.Size) -> str:
        """The error message if they do not become the parameter."""
        name, tensor = next((name, one) for ones in self.found.values() for one in ones for name in one.leaves)
        if not self.operations:
            return f"{name} is {tuple(tensor.shape)}, and config.json says {tuple(shape)}; they do not belong together"
        return (
            f"{name} is no part of {target} of shape {tuple(shape)}; the files use a layout that transformers "
            "converts on loading: load the model and save_pretrained it to a new folder first"
        )


def _groups(model: PreTrainedModel, checkpoint: Checkpoint, shapes: dict[str, torch.Size]) -> dict[str, _Group]:
    """Parameter -> the tensors that become it, matched as in transformers' convert_and_load_state_dict_in_model."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known: dict[str, Any] = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": shapes}
    layouts = checkpoint.layouts
    groups: dict[str, _Group] = {}
    for name in sorted(checkpoint.names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, **known)
        if target not in shapes and name in shapes:  # a rule for older files also matches a present name
            target, pattern = rename_source_key(name, [], [], **known)
        if target not in shapes:
            continue
        if pattern is None:
            group = groups.setdefault(target, _Group([], [name]))
        else:
            rule = converter_of[pattern]
            new = _Group(rule.operations, rule.source_patterns, len(rule.target_patterns))
            group = groups.setdefault(target, new)
        group.found.setdefault(pattern or name, []).append(_Joined(torch.Size(layouts[name].shape), {name: ()}))
    return groups


def _stack(operation: Any, found: _Found, _: torch.Size) -> _Found | None:
    """`MergeModulelist`: stack the tensors of each pattern along a new dimension."""
    stacked: _Found = {}
    for pattern, tensors in found.items():
        sizes = list(tensors[0].shape)
        if any(list(tensor.shape) != sizes for tensor in tensors):
            return None
        sizes.insert(operation.dim, len(tensors))
        steps = [partial(torch.select, dim=operation.dim, index=index) for index in range(len(tensors))]
        stacked[pattern] = [_Joined(torch.Size(sizes), _leaves(tensors, steps))]
    return stacked


def _concatenate(operation: Any, found: _Found, _: torch.Size) -> _Found | None:
    """`Concatenate`: concatenate all tensors, pattern after pattern, along one dimension."""
    dim = operation.dim
    tensors = [tensor for some in found.values() for tensor in some]
    sizes = list(tensors[0].shape)
    others = [(*tensor.shape[:dim], *tensor.shape[dim + 1 :]) for tensor in tensors]
    if len(sizes) <= dim or any(other != others[0] for other in others):
        return None
    lengths = [tensor.shape[dim] for tensor in tensors]
    sizes[dim] = sum(lengths)
    steps = [
        partial(torch.narrow, dim=dim, start=end - length, length=length)
        for end, length in zip(accumulate(lengths), lengths, strict=True)
    ]
    return {"": [_Joined(torch.Size(sizes), _leaves(tensors, steps))]}


def _transpose(operation: Any, found: _Found, shape: torch.Size) -> _Found | None:
    """`Transpose`: swap two dimensions of one tensor; some rules do so only if its shape is not the parameter's."""
    tensors = [tensor for some in found.values() for tensor in some]
    if operation.check_dims and tensors[0].shape == shape:
        return found
    if len(tensors) != 1:
        return None
    sizes = list(tensors[0].shape)
    first, second = operation.dim0, operation.dim1
    sizes[first], sizes[second] = sizes[second], sizes[first]
    steps = [partial(torch.transpose, dim0=first, dim1=second)]
    return {"": [_Joined(torch.Size(sizes), _leaves(tensors, steps))]}


def _leaves(tensors: list[_Joined], steps: list[Callable[..., Tensor]]) -> dict[str, tuple[_View, ...]]:
    """The steps to all leaves of `tensors`, which are parts of one new tensor, each reached by its own step."""
    return {
        name: (step, *way) for tensor, step in zip(tensors, steps, strict=True) for name, way in tensor.leaves.items()
    }


_JOINS: dict[type[ConversionOps], Callable[[Any, _Found, torch.Size], _Found | None]] = {
    MergeModulelist: _stack,
    Concatenate: _concatenate,
    Transpose: _transpose,
}
