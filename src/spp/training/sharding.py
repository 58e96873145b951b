"""Sharding the model over several processes: the Trainer's arguments for it, and gathering what is trained.

FSDP is torch's FSDP2 (`fully_shard`); ZeRO-3 is DeepSpeed's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
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
        raise UsageError('sharding zero3 needs DeepSpeed: pip install "spp-llm[deepspeed]"; fsdp needs nothing more')


def sharding_arguments(settings: TrainingSettings, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of TrainingArguments for sharding.

    Args:
        settings: its `sharding` is used.
        dtype: dtype that the model computes in.
    """
    if settings.sharding == "fsdp":
        # What is trained is small: a checkpoint holds it whole, and may be resumed by any number of processes.
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


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name of every parameter that is trained -> the parameter."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def whole_trained(model: nn.Module) -> dict[str, Tensor]:
    """Name of every trained parameter -> a full copy. All processes must call it, and all get the same."""
    return {name: whole(parameter) for name, parameter in trained_parameters(model).items()}


@torch.no_grad()
def set_trained(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set trained parameters, which may be sharded by FSDP, to the values of `whole_trained`."""
    parameters = trained_parameters(model)
    for name, value in values.items():
        own = parameters[name]
        if isinstance(own.data, DTensor):
            value = distribute_tensor(value.to(own.device), own.data.device_mesh, own.data.placements)
        own.copy_(value)


def whole(parameter: nn.Parameter) -> Tensor:
    """A full copy of a parameter, which may be sharded; then all processes must call it."""
    if isinstance(parameter.data, DTensor):
        return parameter.data.full_tensor()
    if hasattr(parameter, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters  # pyright: ignore[reportMissingImports]  # an extra

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach().clone()
