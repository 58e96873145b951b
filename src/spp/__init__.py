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
    from spp.checkpoints.options import PushOptions as PushOptions
    from spp.checkpoints.options import VerifyOptions as VerifyOptions
    from spp.checkpoints.push import push_to_hub as push_to_hub
    from spp.checkpoints.verify import verify as verify
    from spp.errors import SppError as SppError
    from spp.errors import UsageError as UsageError
    from spp.evaluation.evaluate import evaluate as evaluate
    from spp.evaluation.options import EvalOptions as EvalOptions
    from spp.models.pack_model import pack_ as pack_
    from spp.models.pack_model import unpack_ as unpack_
    from spp.models.packed_linear import PackedLinear as PackedLinear
    from spp.models.semi_structured import to_semi_structured as to_semi_structured
    from spp.ops import spp_linear as spp_linear
    from spp.pipeline.options import RunOptions as RunOptions
    from spp.pipeline.run import run as run
    from spp.pruning.in_memory import prune_model as prune_model
    from spp.pruning.options import PruneOptions as PruneOptions
    from spp.pruning.options import PruningSettings as PruningSettings
    from spp.pruning.prune import prune as prune
    from spp.training.options import TrainOptions as TrainOptions
    from spp.training.train import train as train

_HOMES = {
    "ConvertOptions": "spp.adapters.options",
    "EvalOptions": "spp.evaluation.options",
    "MergeOptions": "spp.adapters.options",
    "PackedLinear": "spp.models.packed_linear",
    "PruneOptions": "spp.pruning.options",
    "PruningSettings": "spp.pruning.options",
    "PushOptions": "spp.checkpoints.options",
    "RunOptions": "spp.pipeline.options",
    "SppConfig": "spp.adapters.tuner",
    "SppError": "spp.errors",
    "SppModel": "spp.adapters.tuner",
    "TrainOptions": "spp.training.options",
    "UsageError": "spp.errors",
    "VerifyOptions": "spp.checkpoints.options",
    "convert": "spp.adapters.convert",
    "evaluate": "spp.evaluation.evaluate",
    "merge": "spp.adapters.merge",
    "pack_": "spp.models.pack_model",
    "prune": "spp.pruning.prune",
    "prune_model": "spp.pruning.in_memory",
    "push_to_hub": "spp.checkpoints.push",
    "run": "spp.pipeline.run",
    "spp_linear": "spp.ops",
    "to_semi_structured": "spp.models.semi_structured",
    "train": "spp.training.train",
    "unpack_": "spp.models.pack_model",
    "verify": "spp.checkpoints.verify",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'spp' has no attribute {name!r}")


# Not `import peft`, which takes seconds: `PeftModel.from_pretrained` works after `import spp` all the same.
register_post_import_hook(lambda _: import_module("spp.adapters.tuner"), "peft")
