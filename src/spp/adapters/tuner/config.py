"""The settings of an SPP adapter, as PEFT saves them in `adapter_config.json`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import PeftType

from spp.adapters.options import AdapterSettings
from spp.errors import shown
from spp.ops.reference import MOST_DIRECTIONS


def _option(name: str, more: str = "") -> Any:
    """A field with the default and the description of an option of `spp train`, to which `more` is added."""
    option = AdapterSettings.model_fields[name]
    return field(default=option.default, metadata={"help": f"{option.description}{more}"})


@dataclass
class SppConfig(PeftConfig):
    """Settings of an SPP adapter, W' = W + scale * W * (A[g] B) (eq. 5 of the paper, where directions is 1).

    Zeros of W stay zeros, in training and in merging. The defaults are those of `spp train`. If `r` is None, adding the
    adapter to a model sets `r` and `rank_pattern` to the row groups that its layers got, so that they are saved.

    `task_type`, `base_model_name_or_path`, `inference_mode` and `revision` are PEFT's own.

    Raises:
        ValueError: a field has an invalid value; one error names all such fields.
    """

    r: int | None = _option("r")
    lora_rank: int = _option("lora_rank")
    directions: int = _option("directions")
    scale: float = _option("scale")
    init_weights: bool | Literal["ones", "published"] = _option(
        "init_weights", more="; True means ones, False draws A and B at random, so that W' != W (for tests)"
    )
    mode: Literal["fused", "split"] = _option("mode")
    dropout: float = _option("dropout")
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "names, a regular expression, or all-linear (also if None)"}
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "stacks of experts to adapt, such as mlp.experts.down_proj: names or the ends of names (default: "
            "where all linear layers are adapted, those that are pruned)"
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "modules not to adapt: names or a regular expression"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "indices of the layers to adapt; not with target_modules as a str"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "name of the list of layers, where layers_to_transform does not find it"}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "name or regular expression of a module -> its own r"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules to train whole and to save with the adapter, such as a new head"}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "rows of the embedding to train as well, for newly added tokens"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["SPP"]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            named = isinstance(value, list) and all(isinstance(one, str) for one in value)
            setattr(self, name, set(value) if named else value)
        if problems := list(self._problems()):
            raise ValueError("SppConfig: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        ranks = {} if self.r is None else {"r": self.r}
        ranks["lora_rank"] = self.lora_rank
        patterns = self.rank_pattern if isinstance(self.rank_pattern, dict) else {}
        ranks |= {f"rank_pattern[{key!r}]": rank for key, rank in patterns.items()}
        for name, rank in ranks.items():
            if not _is_whole(rank) or rank < 1:
                yield f"{name} must be a positive integer, but it is {shown(rank)}"
        if not isinstance(self.rank_pattern, dict):
            yield f"rank_pattern must be a dict of names and ranks, but it is {shown(self.rank_pattern)}"
        for key in patterns:
            try:
                re.compile(key)
            except (re.error, TypeError, RecursionError, OverflowError) as error:
                yield f"rank_pattern has {shown(key)}, which is no name or regular expression ({error})"
        if not _is_whole(self.directions) or not 1 <= self.directions <= MOST_DIRECTIONS:
            yield f"directions must be an integer from 1 to {MOST_DIRECTIONS}, but it is {shown(self.directions)}"
        if not _is_number(self.scale) or not self.scale > 0:
            yield f"scale must be a number above 0, but it is {shown(self.scale)}"
        if self.mode not in ("fused", "split"):
            yield f"mode must be fused or split, but it is {shown(self.mode)}"
        if not (isinstance(self.init_weights, bool) or self.init_weights in ("ones", "published")):
            yield f"init_weights must be ones, published, True or False, but it is {shown(self.init_weights)}"
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            yield f"dropout must be at least 0 and below 1, but it is {shown(self.dropout)}"
        yield from self._problems_of_modules()

    def _problems_of_modules(self) -> Iterator[str]:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            named = isinstance(value, list | set | tuple) and all(isinstance(one, str) for one in value)
            if value is not None and not isinstance(value, str) and not named:
                yield f"{name} must be names or a regular expression, but it is {shown(value)}"
        stacks = self.target_parameters
        if stacks is not None and not (isinstance(stacks, list) and all(isinstance(one, str) for one in stacks)):
            yield f"target_parameters must be a list of names, but it is {shown(stacks)}"
        indices = self.layers_to_transform
        if indices is not None and not all(map(_is_whole, indices if isinstance(indices, list) else [indices])):
            yield f"layers_to_transform must be indices of layers, but it is {shown(indices)}"
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    yield (
                        f"`{name}` cannot be used when `target_modules` is a str; list names instead, "
                        "or leave it out for all linear layers"
                    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
