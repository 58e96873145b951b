"""What `save_pretrained` writes of a model with packed layers: a dense checkpoint, which loads everywhere."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from spp.models.packed_linear import PackedLinear


class _SavesDense:
    """Mixin of a model class: its packed layers are saved under the names and in the shape of those they replaced.

    A packed layer's own tensors would be saved under names that no other program knows, which then loads the model with
    random weights in their place.
    """

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """As that of transformers; the dense copies of all packed weights are in memory at once."""
        assert isinstance(self, PreTrainedModel)
        given = self.state_dict() if state_dict is None else state_dict
        dense = dense_state_dict(self, given)
        return super().save_pretrained(save_directory, is_main_process, state_dict=dense, **kwargs)  # pyright: ignore


def dense_state_dict(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A model's state dict with the dense weight of every packed layer instead of its packed tensors."""
    dense: dict[str, Any] = dict(state_dict)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            parts = {one: dense.pop(f"{name}.{one}", None) for one in ("values", "bitmask", "row_offsets")}
            if all(isinstance(one, Tensor) for one in parts.values()):
                dense[f"{name}.weight"] = module.weight.contiguous()
    return dense


def save_dense_(model: PreTrainedModel) -> None:
    """Make a model save its packed layers dense; it stays an instance of its class, under the same name."""
    if not isinstance(model, _SavesDense):
        model.__class__ = _class_that_saves_dense(type(model))


def save_plainly_(model: nn.Module) -> None:
    """Undo `save_dense_`, once nothing is packed any more."""
    if isinstance(model, _SavesDense):
        model.__class__ = type(model).__mro__[2]


@cache
def _class_that_saves_dense(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    # transformers writes the class's name into config.json, and looks for code of a model's own in its module.
    return type(kind.__name__, (_SavesDense, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
