"""The table of families in docs/models.md: what it says, and what it has to say."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from spp.models.architecture import decoder_blocks, prunable_matrices

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"

Row = tuple[str, str, str]
"""A family's blocks, what is pruned in them, and what of that gets no adapter, as on the page."""


def rows() -> dict[str, Row]:
    """The rows of the page, by family, without their notes."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines()]
    return {row[0].strip("`"): (row[1], row[2], row[3]) for row in cells if row and row[0][:1] == "`"}


def matrices_of(model: PreTrainedModel) -> list[str]:
    """The names of all matrices that can be pruned."""
    prefix, blocks = decoder_blocks(model)
    return [one.name for index, block in enumerate(blocks) for one in prunable_matrices(f"{prefix}.{index}", block)]


def row_of(model: PreTrainedModel, adapted: Iterable[str]) -> Row:
    """The row of a model of which these layers, and stacks of experts, have adapters."""
    prefix, names, adapted = decoder_blocks(model)[0], matrices_of(model), list(adapted)
    without = [name for name in names if name not in adapted and not _is_in_a_stack(name, adapted)]
    return f"`{prefix}`", _by_module(names, prefix), _by_module(without, prefix)


def _is_in_a_stack(name: str, stacks: list[str]) -> bool:
    """Whether `experts.0.gate_proj` is part of `experts.gate_up_proj`."""
    expert, _, layer = name.rpartition(".")
    experts, part = expert.rpartition(".")[0], layer.partition("_")[0]
    return any(stack.startswith(f"{experts}.") and part in stack.rpartition(".")[2].split("_") for stack in stacks)


def _by_module(names: Iterable[str], prefix: str) -> str:
    layers: dict[str, dict[str, None]] = {}
    for name in names:
        inside = re.sub(r"\.\d+\.", ".*.", name.removeprefix(f"{prefix}.").partition(".")[2])
        module, _, layer = inside.rpartition(".")
        layers.setdefault(module, {})[layer] = None
    return "; ".join(
        f"{module}: {', '.join(found)}" if module else ", ".join(found) for module, found in layers.items()
    )


def skip_if_unknown(family: str) -> None:
    """Skip a test of a family that the installed transformers does not have yet."""
    if family.partition("-")[0] not in CONFIG_MAPPING:
        pytest.skip(f"{family} needs a newer transformers")
