"""Sharding the model over several processes: the Trainer's arguments for it, and gathering the factors.

FSDP is torch's FSDP2 (`fully_shard`); ZeRO-3 is DeepSpeed's.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from spp.errors import UsageError
from spp.models.architecture import decoder_blocks
from spp.runtime import distributed
from spp.training.options import TrainingSettings


def require_sharding(settings: TrainingSettings) -> None:
    """Check that the requested sharding is possible.

    Raises:
        UsageError: there is only one process, or DeepSpeed is not installed.
    """
    if settings.sharding == "none":
        return
    if distributed.launched_world_size() == 1:
        raise UsageError(
            f"sharding {settings.sharding} divides the model among processes, and this is the only one; start it with "
            "torchrun --nproc-per-node N -m spp train, or leave out --sharding"
        )
    if settings.sharding == "zero3" and importlib.util.find_spec("deepspeed") is None:
        raise UsageError('sharding zero3 needs DeepSpeed: pip install "spp[deepspeed]"; fsdp needs nothing more')


def sharding_arguments(settings: TrainingSettings, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of TrainingArguments for sharding.

    Args:
        settings: its `sharding` is used.
        dtype: dtype that the model computes in.
    """
    if settings.sharding == "fsdp":
        # Factors are small, so that a checkpoint holds them whole, and may be resumed by any number of processes.
        return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
    if settings.sharding == "zero3":
        return {"deepspeed": _zero3(dtype)}
    return {}


def _zero3(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        # The Trainer's own AdamW: that of DeepSpeed would have to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


def divide(model: PreTrainedModel, device: torch.device) -> None:
    """Shard a frozen model over the processes, in place; its blocks are gathered when they are needed (FSDP2).

    Args:
        model: in CPU memory.
        device: this process's device, for its shard.
    """
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for block in decoder_blocks(model)[1]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_factors(adapted: PeftModel) -> dict[str, Tensor]:
    """Name of every trained parameter -> a full copy. All processes must call it, and all get the same."""
    return {name: _whole(parameter) for name, parameter in adapted.named_parameters() if parameter.requires_grad}


def set_factors(adapted: PeftModel, factors: dict[str, Tensor]) -> None:
    """Set the trained parameters, which must not be sharded, to the values of `whole_factors`."""
    parameters = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, value in factors.items():
            parameters[name].copy_(value)


def _whole(parameter: nn.Parameter) -> Tensor:
    if isinstance(parameter.data, DTensor):
        return parameter.data.full_tensor()
    if hasattr(parameter, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters  # pyright: ignore[reportMissingImports]  # an extra

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach().clone()
