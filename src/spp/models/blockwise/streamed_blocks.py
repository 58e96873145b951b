"""The decoder blocks of a model that stays in its files: each is read when it is needed, and forgotten when done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spp.checkpoints.checkpoint import Checkpoint
from spp.errors import UsageError
from spp.models.architecture import decoder_blocks
from spp.models.weight_map import Part, require_filled, weight_map
from spp.runtime.memory import return_freed_memory


class StreamedBlocks:
    """The blocks of one model, of which one is in memory at a time; see `spp.models.blockwise.walk.Blocks`.

    Args:
        model: without weights: its parameters are on the meta device, its buffers real.
        checkpoint: the files with the weights.
        device: device to compute on.

    Raises:
        UsageError: blocks share weights.
        SppError: the checkpoint lacks weights, or holds them in another layout.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device) -> None:
        self.model, self.device = model, device
        self._checkpoint = checkpoint
        self._prefix, self._blocks = decoder_blocks(model)
        _require_own_weights(self._prefix, self._blocks)
        parts = weight_map(model, checkpoint)
        self._parts: dict[str, dict[str, Part]] = {}
        for name, part in parts.items():
            self._parts.setdefault(part.parameter, {})[name] = part
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        # Tied parameters have their values under the first of their names.
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        self._first = {name: first[id(one)] for name, one in model.named_parameters(remove_duplicate=False)}
        inside = (name for name, _ in model.named_parameters() if name.startswith(f"{self._prefix}."))
        require_filled(parts, inside, checkpoint)

    def stored_names(self) -> set[str]:
        """Names in the file of all tensors that belong to blocks."""
        inside = [parts for name, parts in self._parts.items() if name.startswith(f"{self._prefix}.")]
        return {name for parts in inside for name in parts}

    def stored_whole(self) -> dict[str, str]:
        """Parameter -> the name in the files of the single tensor that holds it as it is."""
        return {
            name: stored
            for name, parts in self._parts.items()
            for stored, part in parts.items()
            if len(parts) == 1 and not part.steps
        }

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """Context manager in which modules outside of the blocks read their weights when they are first called."""
        inside = {id(module) for block in self._blocks for module in block.modules()}
        outside = [(name, one) for name, one in self.model.named_modules() if id(one) not in inside]
        hooks = [
            module.register_forward_pre_hook(lambda module, _, name=name: self._fill(name, module))
            for name, module in outside
        ]
        try:
            asked = self._asked_where_they_are()
            for name, module in outside:
                if id(module) in asked:
                    self._fill(name, module)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for _, module in outside:
                _empty(module)

    def _asked_where_they_are(self) -> set[int]:
        """Modules that models ask for their device before they call them, to send something there.

        These are the embeddings, and the owner of the first parameter of a model or of a model in it: its `device`.
        """
        asked = {id(self.model.get_input_embeddings())}
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel) and (first := next(module.named_parameters(), None)):
                asked.add(id(module.get_submodule(first[0].rpartition(".")[0])))
        return asked

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Context manager that yields block `index` with the weights from its files."""
        block = self._blocks[index]
        for name, module in block.named_modules(prefix=f"{self._prefix}.{index}"):
            self._fill(name, module)
        try:
            yield block
        finally:
            for module in block.modules():
                _empty(module)
            return_freed_memory()  # or each block would find less room than the one before it

    def stored(self, index: int) -> dict[str, tuple[Part, Tensor]]:
        """The tensors of a loaded block: name in the files -> which part of which parameter it is, and its values."""
        block = self._blocks[index]
        tensors = dict(block.named_parameters(prefix=f"{self._prefix}.{index}"))
        tensors |= dict(block.named_buffers(prefix=f"{self._prefix}.{index}"))
        return {
            stored: (part, part.view(tensor.detach()))
            for name, tensor in tensors.items()
            for stored, part in self._parts.get(name, {}).items()
        }

    def _fill(self, name: str, module: nn.Module) -> None:
        """Read a module's own weights, unless it has them."""
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                first = self._first[f"{name}.{key}"]
                known = self.model.get_parameter(first)
                module.register_parameter(key, self._new(first, parameter) if known.is_meta else known)
        for key, buffer in module.named_buffers(recurse=False):
            self._read(f"{name}.{key}", buffer)

    def _new(self, name: str, meta: nn.Parameter) -> nn.Parameter:
        """A parameter with its values from the files."""
        require_filled(self._parts.get(name, {}), [name], self._checkpoint)
        real = torch.empty_like(meta, device=self.device)
        self._read(name, real)
        return nn.Parameter(real, requires_grad=False)

    def _read(self, name: str, real: Tensor) -> None:
        for stored, part in self._parts.get(name, {}).items():
            part.view(real).copy_(self._checkpoint.tensor(stored))


def _require_own_weights(prefix: str, blocks: list[nn.Module]) -> None:
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if (first := owners.setdefault(id(parameter), index)) != index:
                raise UsageError(
                    f"{prefix}.{index} shares {name} with {prefix}.{first}; a model whose blocks share weights cannot "
                    "be read block by block"
                )


def _empty(module: nn.Module) -> None:
    """Forget a module's own weights."""
    for key, parameter in module.named_parameters(recurse=False):
        module.register_parameter(key, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
