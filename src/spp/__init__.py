"""Fine-tune pruned LLMs without losing their sparsity: W' = W + s * W * A[group] * B keeps every zero of W a zero.

Importing the package makes PEFT know the adapter type SPP (as soon as PEFT itself is imported); everything else,
torch included, is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from spp._version import __version__ as __version__

if TYPE_CHECKING:  # explicit re-exports
    from spp.adapters.convert import convert as convert
    from spp.adapters.merge import merge as merge
    from spp.adapters.options import ConvertOptions as ConvertOptions
    from spp.adapters.options import MergeOptions as MergeOptions
    from spp.adapters.tuner import SppConfig as SppConfig
    from spp.adapters.tuner import SppModel as SppModel
    from spp.checkpoints.inspect import inspect_model as inspect
    from spp.checkpoints.options import InspectOptions as InspectOptions
    from spp.checkpoints.options import PackOptions as PackOptions
    from spp.checkpoints.options import PushOptions as PushOptions
    from spp.checkpoints.options import UnpackOptions as UnpackOptions
    from spp.checkpoints.options import VerifyOptions as VerifyOptions
    from spp.checkpoints.pack import unpack as unpack
    from spp.checkpoints.push import push_to_hub as push
    from spp.checkpoints.push import push_to_hub as push_to_hub
    from spp.checkpoints.verify import verify as verify
    from spp.cli.doctor import diagnose as doctor
    from spp.errors import SppError as SppError
    from spp.errors import UsageError as UsageError
    from spp.evaluation.evaluate import evaluate as eval  # noqa: F401 (not in __all__)
    from spp.evaluation.evaluate import evaluate as evaluate
    from spp.evaluation.generate import generate as generate
    from spp.evaluation.options import EvalOptions as EvalOptions
    from spp.evaluation.options import GenerateOptions as GenerateOptions
    from spp.models.pack_model import pack_ as pack_
    from spp.models.pack_model import unpack_ as unpack_
    from spp.models.packed_linear import PackedLinear as PackedLinear
    from spp.models.semi_structured import to_semi_structured as to_semi_structured
    from spp.models.trainable_values import trainable_values as trainable_values
    from spp.ops import spp_linear as spp_linear
    from spp.pipeline.options import RunOptions as RunOptions
    from spp.pipeline.run import run as run
    from spp.pruning.in_memory import prune_model as prune_model
    from spp.pruning.options import PruneOptions as PruneOptions
    from spp.pruning.options import PruningSettings as PruningSettings
    from spp.pruning.pack import pack as pack
    from spp.pruning.prune import prune as prune
    from spp.reporting.options import ReportOptions as ReportOptions
    from spp.reporting.report import report as report
    from spp.training.options import CacheTeacherOptions as CacheTeacherOptions
    from spp.training.options import TrainOptions as TrainOptions
    from spp.training.teacher_cache import cache_teacher as cache_teacher
    from spp.training.train import train as train

_HOMES = {
    "CacheTeacherOptions": "spp.training.options",
    "ConvertOptions": "spp.adapters.options",
    "EvalOptions": "spp.evaluation.options",
    "GenerateOptions": "spp.evaluation.options",
    "InspectOptions": "spp.checkpoints.options",
    "MergeOptions": "spp.adapters.options",
    "PackOptions": "spp.checkpoints.options",
    "PackedLinear": "spp.models.packed_linear",
    "PruneOptions": "spp.pruning.options",
    "PruningSettings": "spp.pruning.options",
    "PushOptions": "spp.checkpoints.options",
    "ReportOptions": "spp.reporting.options",
    "RunOptions": "spp.pipeline.options",
    "SppConfig": "spp.adapters.tuner",
    "SppError": "spp.errors",
    "SppModel": "spp.adapters.tuner",
    "TrainOptions": "spp.training.options",
    "UnpackOptions": "spp.checkpoints.options",
    "UsageError": "spp.errors",
    "VerifyOptions": "spp.checkpoints.options",
    "cache_teacher": "spp.training.teacher_cache",
    "convert": "spp.adapters.convert",
    "doctor": "spp.cli.doctor:diagnose",
    "eval": "spp.evaluation.evaluate:evaluate",
    "evaluate": "spp.evaluation.evaluate",
    "generate": "spp.evaluation.generate",
    "inspect": "spp.checkpoints.inspect:inspect_model",
    "merge": "spp.adapters.merge",
    "pack": "spp.pruning.pack",
    "pack_": "spp.models.pack_model",
    "prune": "spp.pruning.prune",
    "prune_model": "spp.pruning.in_memory",
    "push": "spp.checkpoints.push:push_to_hub",
    "push_to_hub": "spp.checkpoints.push",
    "report": "spp.reporting.report",
    "run": "spp.pipeline.run",
    "spp_linear": "spp.ops",
    "to_semi_structured": "spp.models.semi_structured",
    "train": "spp.training.train",
    "trainable_values": "spp.models.trainable_values",
    "unpack": "spp.checkpoints.pack",
    "unpack_": "spp.models.pack_model",
    "verify": "spp.checkpoints.verify",
}
"""Public name -> its module, and its name there where that is another one. Every command has a function of its name."""

# All names but `eval`: `from spp import *` must not replace Python's own.
__all__ = [
    "CacheTeacherOptions",
    "ConvertOptions",
    "EvalOptions",
    "GenerateOptions",
    "InspectOptions",
    "MergeOptions",
    "PackOptions",
    "PackedLinear",
    "PruneOptions",
    "PruningSettings",
    "PushOptions",
    "ReportOptions",
    "RunOptions",
    "SppConfig",
    "SppError",
    "SppModel",
    "TrainOptions",
    "UnpackOptions",
    "UsageError",
    "VerifyOptions",
    "__version__",
    "cache_teacher",
    "convert",
    "doctor",
    "evaluate",
    "generate",
    "inspect",
    "merge",
    "pack",
    "pack_",
    "prune",
    "prune_model",
    "push",
    "push_to_hub",
    "report",
    "run",
    "spp_linear",
    "to_semi_structured",
    "train",
    "trainable_values",
    "unpack",
    "unpack_",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, _, other = _HOMES[name].partition(":")
        return getattr(import_module(module), other or name)
    raise AttributeError(f"module 'spp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


# Not `import peft`, which takes seconds: `PeftModel.from_pretrained` works after `import spp` all the same.
register_post_import_hook(lambda _: import_module("spp.adapters.tuner"), "peft")
