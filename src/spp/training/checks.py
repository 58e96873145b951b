"""Checks before a model is loaded: incompatible settings and missing libraries."""

from __future__ import annotations

from spp.errors import Problems
from spp.models.quantized import require_bitsandbytes
from spp.training.options import TrainingSettings
from spp.training.sharding import require_sharding
from spp.training.trainer_arguments import batching, reports


def check_settings(settings: TrainingSettings) -> None:
    """Refuse settings that these processes and the installed libraries do not support.

    Raises:
        UsageError: a batch that does not divide, or a library that is not installed; lists every problem.
    """
    problems = Problems()
    problems.of(batching, settings)
    problems.of(require_sharding, settings)
    for name in ("quantize", "optimizer"):
        if getattr(settings, name) not in ("none", "adamw"):
            problems.of(require_bitsandbytes, f"{name} {getattr(settings, name)}")
    problems.of(reports, settings)
    problems.raise_any()
