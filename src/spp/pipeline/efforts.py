"""Efforts of `spp run`: values for options that were not given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from spp.pipeline.bundled import bundled_model

Effort = Literal["quick", "standard", "best"]

EFFORTS: dict[Any, dict[str, Any]] = {
    "standard": {"criterion": "admm", "reconstruct": "block"},
    "best": {
        "criterion": "admm",
        "refine": "swaps",
        "reconstruct": "block",
        "samples": 256,
        "epochs": 2.0,
        "learning_rate": "auto",
    },
}
"""Effort -> option -> value; all also have the run's dense model as teacher. Quick has the options' own defaults."""


def with_effort(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run, with those of its effort where they are missing or None.

    Raises:
        ValueError: the effort needs a dense model, and the run is told to keep the zeros of a sparse one.
    """
    effort = str(values.get("effort"))
    if effort not in EFFORTS:
        return dict(values)
    if values.get("keep_zeros"):
        raise ValueError(
            f"effort {effort} learns from a dense model, and keep-zeros has none; give effort quick, or no keep-zeros"
        )
    chosen = {**EFFORTS[effort], "teacher": values.get("model") or str(bundled_model())}
    return {**values, **{name: value for name, value in chosen.items() if values.get(name) is None}}
