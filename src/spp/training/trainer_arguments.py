"""Arguments of transformers' Trainer from the options of `spp train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from spp.errors import UsageError
from spp.options import listed_names
from spp.runtime import distributed
from spp.training.options import TrainingSettings, TrainOptions
from spp.training.sharding import sharding_arguments

_MOST_AT_ONCE = 8
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def batching(options: TrainingSettings) -> tuple[int, int]:
    """Sequences computed at once on a device, and the number of such batches per step.

    Raises:
        UsageError: the batch does not divide.
    """
    count = distributed.launched_world_size()
    if options.batch_size % count:
        raise UsageError(
            f"batch-size {options.batch_size} does not divide over {count} processes; make it a multiple of them"
        )
    share = _share(options)
    at_once = options.device_batch_size
    if at_once is None:
        at_once = max(count for count in range(1, min(share, _MOST_AT_ONCE) + 1) if share % count == 0)
    if share % at_once:
        raise UsageError(
            f"device-batch-size {at_once} does not divide the {share} sequences of a step that each of {count} "
            f"process(es) computes (batch-size {options.batch_size}); choose a divisor"
        )
    return at_once, share // at_once


def reports(options: TrainingSettings) -> list[str]:
    """Names of the loggers to use.

    Raises:
        UsageError: a name is not known, or its library is not installed.
    """
    wanted = [name for name in listed_names(options.report_to) if name != "none"]
    available = get_available_reporting_integrations()
    if missing := [name for name in wanted if name not in available]:
        raise UsageError(
            f"report-to: {', '.join(missing)} cannot be used here, because it is not installed or not supported by "
            f"transformers; available: {', '.join(available) or 'none'}"
        )
    return wanted


def smaller_batch(options: TrainingSettings, sequences: int) -> int | None:
    """The next smaller number of sequences at once that gives the same steps; None if it is fixed by the user.

    Also None for several processes, which could not agree on it: only one of them may be out of memory.
    """
    if options.device_batch_size is not None or distributed.launched_world_size() > 1:
        return None
    return max((count for count in range(1, sequences) if options.batch_size % count == 0), default=None)


def training_arguments(
    options: TrainOptions,
    rate: float,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    sequences: int,
    *,
    gradient_checkpointing: bool,
    evaluate_first: bool,
) -> TrainingArguments:
    """The Trainer's arguments.

    Args:
        options: ours.
        rate: the peak learning rate.
        folder: folder for checkpoints.
        dtype: dtype that the model computes in.
        device: device to train on.
        sequences: sequences computed at once on a device.
        gradient_checkpointing: whether to recompute activations in backward.
        evaluate_first: whether to evaluate on the held-out examples, if there are some, before the first step.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        fp16=dtype == torch.float16 and device.type != "cpu",  # scales the loss, which fp16 gradients need
        remove_unused_columns=False,
        seed=options.seed,
        use_cpu=device.type == "cpu",
        learning_rate=rate,
        **_optimization(options, sequences),
        **_records(options),
        eval_on_start=evaluate_first and options.held_out > 0,
        **sharding_arguments(options, dtype),
    )
    _choose_device(arguments, device)
    return arguments


def _optimization(options: TrainingSettings, sequences: int) -> dict[str, Any]:
    """Arguments for batches, the number of steps, and the schedule."""
    return {
        "per_device_train_batch_size": sequences,
        "gradient_accumulation_steps": _share(options) // sequences,
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        **({"optim": "adamw_bnb_8bit"} if options.optimizer == "adamw-8bit" else {}),
        "weight_decay": options.weight_decay,
        "warmup_steps": options.warmup_ratio if options.warmup_ratio < 1 else 1 - 1e-9,  # below 1 it is a share
        "lr_scheduler_type": _SCHEDULES[options.schedule],
    }


def _records(options: TrainingSettings) -> dict[str, Any]:
    """Arguments for saving, evaluating and logging."""
    return {
        "save_strategy": "steps",
        "save_steps": options.save_steps,
        "save_total_limit": options.keep,
        "eval_strategy": "steps" if options.held_out else "no",
        "eval_steps": options.eval_steps or options.save_steps,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "report_to": reports(options),
        "disable_tqdm": True,
    }


def _choose_device(arguments: TrainingArguments, device: torch.device) -> None:
    """Make the arguments use `device`, if they would choose another.

    A single process would use the first GPU, whatever was asked for, and spread its batches over all GPUs. One of
    several on a CPU would use "cpu:0", to which optimizer states cannot be loaded.
    """
    cache = arguments.__dict__  # behind `arguments.device`
    if device.type == "cpu":
        cache["_setup_devices"] = device
    elif "WORLD_SIZE" not in os.environ and torch.accelerator.device_count() > 1:
        chosen = torch.device(device.type, device.index or 0)
        torch.accelerator.set_device_index(chosen.index)
        cache["_setup_devices"] = chosen
        arguments._n_gpu = 1


def _share(options: TrainingSettings) -> int:
    """Sequences of a step that one process computes."""
    return options.batch_size // distributed.launched_world_size()
