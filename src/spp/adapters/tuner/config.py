"""The settings of an SPP adapter, as PEFT saves them in `adapter_config.json`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig
from peft.utils import PeftType

from spp.ops.reference import MOST_DIRECTIONS


@dataclass
class SppConfig(PeftConfig):
    """W' = W + scale * W * (A[g] B): zeros of W stay zeros, in training and in merging (SPP, ICML 2024).

    `task_type`, `base_model_name_or_path`, `inference_mode` and `revision` are PEFT's own.

    Raises:
        ValueError: a field holds what it cannot; all such fields are named at once.
    """

    r: int = field(default=8, metadata={"help": "row groups R; at most the layer's output features"})
    directions: int = field(
        default=4,
        metadata={
            "help": "directions K, up to 16: rows of A for each group, which its rows mix; published: 1, with r=16"
        },
    )
    scale: float = field(default=2.0, metadata={"help": "factor s of the update; the published runs use 2"})
    mode: Literal["fused", "split"] = field(
        default="fused",
        metadata={
            "help": "fused: three GEMMs a step on W' rounded once, the bits of the merged model; split: four, and "
            "updates too small to change a bf16 weight still count"
        },
    )
    dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter branch; costs one more GEMM"})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "names, a regular expression, or all-linear, which is what None means"}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "names or a regular expression of modules to leave alone"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "indices of the layers to adapt; not with target_modules as a str"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "name of the list of layers, where layers_to_transform does not find it"}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "name or regular expression of a module -> its r, instead of r"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules to train whole and to save with the adapter, such as a new head"}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "rows of the embedding to train as well, for tokens that were added"}
    )
    init_weights: bool | Literal["ones", "published"] = field(
        default=True,
        metadata={
            "help": "ones, which is what True means: A = 0 and a 1 in each row of B; published: "
            "A ~ U(-1/sqrt(I), 1/sqrt(I)) and B = 0; False draws both, so that W' != W (for tests)"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["SPP"]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if problems := list(self._problems()):
            raise ValueError("SppConfig: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}}
        for name, rank in ranks.items():
            if not isinstance(rank, int) or rank < 1:
                yield f"{name} must be a positive integer, but it is {rank!r}"
        for key in self.rank_pattern:
            try:
                re.compile(key)
            except (re.error, TypeError) as error:
                yield f"rank_pattern has {key!r}, which is no name or regular expression ({error})"
        if not isinstance(self.directions, int) or not 1 <= self.directions <= MOST_DIRECTIONS:
            yield f"directions must be an integer from 1 to {MOST_DIRECTIONS}, but it is {self.directions!r}"
        if not self.scale > 0:
            yield f"scale must be above 0, but it is {self.scale!r}"
        if self.mode not in ("fused", "split"):
            yield f"mode must be fused or split, but it is {self.mode!r}"
        if self.init_weights not in (True, False, "ones", "published"):
            yield f"init_weights must be ones, published, True or False, but it is {self.init_weights!r}"
        if not 0 <= self.dropout < 1:
            yield f"dropout must be at least 0 and below 1, but it is {self.dropout!r}"
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    yield (
                        f"`{name}` cannot be used when `target_modules` is a str; list names instead, "
                        "or leave it out for all linear layers"
                    )
