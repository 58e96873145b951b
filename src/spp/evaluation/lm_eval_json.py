"""The results of tasks as lm-eval's own JSON, for what reads its files."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spp.checkpoints.json_files import write_text
from spp.evaluation.options import EvalOptions


def write_lm_eval_json(
    path: Path, results: Mapping[str, Any], scored: Any, options: EvalOptions, limit: int | None
) -> None:
    """Write what `lm_eval --output_path` would: its results, with what they depend on.

    Args:
        path: the file.
        results: what lm-eval's `evaluate` returned.
        scored: the model as lm-eval knows it.
        options: names and settings.
        limit: items of each task.
    """
    config = {
        "model": "hf",
        "model_args": {"pretrained": options.model, "dtype": options.dtype, "peft": _text(options.adapter)},
        "batch_size": options.batch_size,
        "device": str(scored.device),
        "limit": limit,
    }
    about = {
        "config": config,
        "date": time.time(),
        "transformers_version": version("transformers"),
        "lm_eval_version": version("lm_eval"),
        "model_source": "spp",
        "model_name": options.model,
        "system_instruction": options.system_instruction,
        "chat_template": scored.chat_template(True) if options.apply_chat_template else None,
        "fewshot_as_multiturn": options.apply_chat_template,
        "max_length": scored.max_length,
    }
    write_text(path, json.dumps({**results, **about}, indent=2, default=str, ensure_ascii=False) + "\n")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
