"""`spp cache-teacher`: store a dense model's predictions, so that training needs only one model in memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp._version import __version__
from spp.checkpoints.atomic_folder import check_output, new_folder
from spp.checkpoints.checkpoint import MANIFEST, Checkpoint
from spp.checkpoints.fingerprint import base_fingerprint
from spp.checkpoints.hub import resolve_model
from spp.checkpoints.json_files import write_json
from spp.checkpoints.safetensors_file import Layout, TensorFile
from spp.data.examples import Example, collate, digest
from spp.errors import SppError, UsageError
from spp.models.loading import context_window, load_model
from spp.ops.zeros import all_finite
from spp.runtime.devices import pick_device
from spp.runtime.progress import track
from spp.training.distillation_loss import top_log_probabilities
from spp.training.options import CacheTeacherOptions
from spp.training.teacher import CACHE_FILE, CACHE_KIND, CACHED_TOGETHER, cached_names, predicted, teacher_dtype
from spp.training.training_data import training_examples

_AT_ONCE = 8
_ENTRY_BYTES = {"I32": 4, "F16": 2}


@dataclass(frozen=True, kw_only=True)
class CacheTeacherReport:
    """The result of `cache_teacher`.

    Attributes:
        examples: number of examples.
        tokens: number of predicted tokens.
        top_k: tokens stored for each prediction.
        kept: mean probability mass of the stored tokens.
        bytes: size of the cache.
    """

    out: Path
    examples: int
    tokens: int
    top_k: int
    kept: float
    bytes: int
    seconds: float


def cache_teacher(options: CacheTeacherOptions) -> CacheTeacherReport:
    """Write a dense model's likeliest tokens and their log-probabilities for all training examples to `options.out`.

    Raises:
        UsageError: a missing model or file, a full output folder, no example in the data.
        SppError: a damaged model, or predictions that are not finite.
    """
    start = time.perf_counter()
    folder = resolve_model(options.model, code=options.trust_remote_code)
    check_output(options.out, options.overwrite, inputs=(folder,))
    Checkpoint.open(folder).require_unquantized("give the dense model as it was before quantization")
    device = pick_device(options.device)
    model = load_model(folder, options, dtype=teacher_dtype(options, folder, device))
    vocabulary = model.config.get_text_config().vocab_size
    if options.top_k > vocabulary:
        raise UsageError(f"top-k {options.top_k} is more than the {vocabulary} tokens of the vocabulary; lower it")
    window = context_window(model.config, options.window)
    examples, _ = training_examples(options, folder, window, vocabulary)
    with new_folder(options.out, overwrite=options.overwrite) as partial:
        kept = _write_answers(partial / CACHE_FILE, model, examples, options)
        write_json(partial / MANIFEST, _manifest(options, base_fingerprint(folder), examples, vocabulary))
    count = sum(one.predictions for one in examples)
    return CacheTeacherReport(
        out=options.out,
        examples=len(examples),
        tokens=count,
        top_k=options.top_k,
        kept=kept / count,
        bytes=(options.out / CACHE_FILE).stat().st_size,
        seconds=time.perf_counter() - start,
    )


def _write_answers(
    path: Path, model: torch.nn.Module, examples: Sequence[Example], options: CacheTeacherOptions
) -> float:
    """Write the predictions for all examples, part by part; return the summed probability of the stored tokens."""
    parts = [examples[first : first + CACHED_TOGETHER] for first in range(0, len(examples), CACHED_TOGETHER)]
    file = TensorFile(path, _layouts(parts, options.top_k))
    kept = 0.0
    for number, part in enumerate(track(parts, "asking the teacher")):
        tokens, log_probabilities = _answers(model, part, options)
        kept += float(log_probabilities.double().exp().sum())
        for name, tensor in zip(cached_names(number), (tokens, log_probabilities), strict=True):
            file.write(name, tensor)
    return kept


def _answers(
    model: torch.nn.Module, examples: Sequence[Example], options: CacheTeacherOptions
) -> tuple[Tensor, Tensor]:
    """The likeliest tokens at all predicted ones, and their log-probabilities, (N, top_k) each, on the CPU.

    Raises:
        SppError: one is not finite.
    """
    batches = (examples[first : first + _AT_ONCE] for first in range(0, len(examples), _AT_ONCE))
    answers = [top_log_probabilities(_logits(model, batch), options.top_k, options.temperature) for batch in batches]
    tokens, log_probabilities = (torch.cat(one).cpu() for one in zip(*answers, strict=True))
    if not all_finite(log_probabilities):
        raise SppError(f"{options.model} predicts NaN or infinity; compute in float32 (--dtype), or check it")
    return tokens, log_probabilities


def _manifest(
    options: CacheTeacherOptions, fingerprint: str, examples: Sequence[Example], vocabulary: int
) -> dict[str, Any]:
    return {
        "tool": "spp",
        "version": __version__,
        "kind": CACHE_KIND,
        "model": options.model,
        "fingerprint": fingerprint,
        "examples": digest(examples),
        "vocabulary": vocabulary,
        "top_k": options.top_k,
        "temperature": options.temperature,
    }


def _layouts(parts: Sequence[Sequence[Example]], top_k: int) -> dict[str, Layout]:
    found = {}
    for number, part in enumerate(parts):
        shape = (sum(one.predictions for one in part), top_k)
        for name, dtype in zip(cached_names(number), _ENTRY_BYTES, strict=True):
            found[name] = Layout(dtype, shape, shape[0] * shape[1] * _ENTRY_BYTES[dtype])
    return found


@torch.no_grad()
def _logits(model: torch.nn.Module, examples: Sequence[Example]) -> Tensor:
    """The logits of all predicted tokens (N, V), example by example."""
    batch = {name: tensor.to(next(model.parameters()).device) for name, tensor in collate(examples).items()}
    rows = predicted(batch.pop("labels"))
    return model(**batch, use_cache=False).logits[:, :-1][rows]
