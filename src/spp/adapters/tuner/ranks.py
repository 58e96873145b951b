"""The number of row groups R of each layer, and its place in the config.

Shapes: O output features, I input features, R row groups, K directions.
"""

from __future__ import annotations

from collections.abc import Mapping

from peft.utils.other import get_pattern_key

from spp.adapters.tuner.config import SppConfig


def rank_of(config: SppConfig, module: str, out_features: int, in_features: int) -> int:
    """R of a layer: from `rank_pattern`, else `r`, else what `lora_rank` allows; it may be above the layer's rows."""
    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module), config.r)
    return like_lora(out_features, in_features, config.directions, config.lora_rank) if rank is None else rank


def like_lora(out_features: int, in_features: int, directions: int, lora_rank: int) -> int:
    """The most row groups R with which SPP has no more parameters on a layer than LoRA: R K I + O K <= r (I + O)."""
    left = lora_rank * (out_features + in_features) - out_features * directions
    return min(max(left // (directions * in_features), 1), out_features)


def set_ranks(config: SppConfig, ranks: Mapping[str, int]) -> None:
    """Write `ranks` (module name -> R) into `r` and `rank_pattern`, so that they are saved with the config."""
    config.r = max(ranks.values())
    config.rank_pattern = {name: rank for name, rank in _shortened(ranks).items() if rank != config.r}


def _shortened(ranks: Mapping[str, int]) -> dict[str, int]:
    """`ranks` by the last part of the names (`down_proj`) if all layers with the same one agree; else by full names."""
    by_last_part: dict[str, set[int]] = {}
    for name, rank in ranks.items():
        by_last_part.setdefault(name.rpartition(".")[2], set()).add(rank)
    if any(len(found) > 1 for found in by_last_part.values()):
        return {f"^{name}": rank for name, rank in ranks.items()}  # or PEFT would match the end of a longer name, too
    return {name: found.pop() for name, found in by_last_part.items()}
