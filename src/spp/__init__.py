"""Fine-tune pruned LLMs without losing their sparsity: W' = W + s * W * A[group] * B keeps every zero of W a zero.

Importing the package makes PEFT know the adapter type SPP (as soon as PEFT itself is imported); everything else,
torch included, is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

__version__ = "0.1.0"

if TYPE_CHECKING:  # explicit re-exports
    from spp.errors import SppError as SppError
    from spp.errors import UsageError as UsageError
    from spp.ops import spp_linear as spp_linear
    from spp.options import (
        ConvertOptions as ConvertOptions,
    )
    from spp.options import (
        EvalOptions as EvalOptions,
    )
    from spp.options import (
        MergeOptions as MergeOptions,
    )
    from spp.options import (
        PruneOptions as PruneOptions,
    )
    from spp.options import (
        PushOptions as PushOptions,
    )
    from spp.options import (
        RunOptions as RunOptions,
    )
    from spp.options import (
        TrainOptions as TrainOptions,
    )
    from spp.options import (
        VerifyOptions as VerifyOptions,
    )
    from spp.packed_linear import PackedLinear as PackedLinear
    from spp.packing import pack_ as pack_
    from spp.packing import unpack_ as unpack_
    from spp.pipeline import run as run
    from spp.semi_structured import to_semi_structured as to_semi_structured
    from spp.stages.convert import convert as convert
    from spp.stages.evaluate import evaluate as evaluate
    from spp.stages.merge import merge as merge
    from spp.stages.prune import prune as prune
    from spp.stages.push import push_to_hub as push_to_hub
    from spp.stages.train import train as train
    from spp.stages.verify import verify as verify
    from spp.tuner import SppConfig as SppConfig
    from spp.tuner import SppModel as SppModel

_HOMES = {
    "ConvertOptions": "spp.options",
    "EvalOptions": "spp.options",
    "MergeOptions": "spp.options",
    "PackedLinear": "spp.packed_linear",
    "PruneOptions": "spp.options",
    "PushOptions": "spp.options",
    "RunOptions": "spp.options",
    "SppConfig": "spp.tuner",
    "SppError": "spp.errors",
    "SppModel": "spp.tuner",
    "TrainOptions": "spp.options",
    "UsageError": "spp.errors",
    "VerifyOptions": "spp.options",
    "convert": "spp.stages.convert",
    "evaluate": "spp.stages.evaluate",
    "merge": "spp.stages.merge",
    "pack_": "spp.packing",
    "prune": "spp.stages.prune",
    "push_to_hub": "spp.stages.push",
    "run": "spp.pipeline",
    "spp_linear": "spp.ops",
    "to_semi_structured": "spp.semi_structured",
    "train": "spp.stages.train",
    "unpack_": "spp.packing",
    "verify": "spp.stages.verify",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'spp' has no attribute {name!r}")


# Not `import peft`, which takes seconds: `PeftModel.from_pretrained` works after `import spp` all the same.
register_post_import_hook(lambda _: import_module("spp.tuner"), "peft")
