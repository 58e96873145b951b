"""A model of which several processes hold a share each: how the Trainer is asked for it, and factors made whole again.

FSDP is torch's second one (`fully_shard`), and ZeRO-3 is DeepSpeed's.
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
    """Check that the model can be divided as it is asked for.

    Raises:
        UsageError: there is nobody to divide it with, or DeepSpeed is not installed.
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
    """What TrainingArguments gets for it.

    Args:
        settings: `sharding`.
        dtype: that the model computes in.
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
    """Leave each process a share of a model that is only read, in place; blocks are gathered when needed (FSDP2).

    Args:
        model: in the CPU's memory.
        device: of this process, where its share goes.
    """
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for block in decoder_blocks(model)[1]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_factors(adapted: PeftModel) -> dict[str, Tensor]:
    """Name of every trained parameter -> a copy of all of it. Every process must call it, and gets the same."""
    return {name: _whole(parameter) for name, parameter in adapted.named_parameters() if parameter.requires_grad}


def set_factors(adapted: PeftModel, factors: dict[str, Tensor]) -> None:
    """Give trained parameters, which must not be divided, the values of `whole_factors`."""
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
