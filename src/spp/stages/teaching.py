"""Teachers: what a batch ought to be predicted like, from a dense model or from what one has been asked before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from spp.checkpoint import MANIFEST, resolve_model
from spp.data.examples import IGNORED, Example, collate, digest
from spp.divergence import divergence, divergence_of_top
from spp.errors import UsageError
from spp.folders import read_json
from spp.loading import compute_dtype, load_model
from spp.options import TrainOptions

CACHE_FILE = "teacher.safetensors"
CACHE_KIND = "teacher-cache"
CACHED_TOGETHER = 64
"""Examples whose distributions are one tensor in the cache."""

_TOKENS, _LOG_PROBABILITIES = "teacher_tokens", "teacher_log_probabilities"


@dataclass(frozen=True)
class Lesson:
    """What a teacher has to say of a batch.

    Attributes:
        divergence: the student's logits of all predicted tokens, (N, V) -> the sum of their divergences, a scalar.
        features: outputs of the teacher's blocks at the predicted tokens, (N, H) each; empty if they are not wanted.
    """

    divergence: Callable[[Tensor], Tensor]
    features: tuple[Tensor, ...] = ()


class Teacher(Protocol):
    """Where lessons come from."""

    def dataset(self, examples: Sequence[Example]) -> list[Any]:
        """What the batches are drawn from."""
        ...

    def collate(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """A batch of items of the dataset."""
        ...

    def lesson(self, batch: dict[str, Any]) -> Lesson:
        """What to learn from a batch; entries that are the teacher's own are taken out of it."""
        ...


def predicted(labels: Tensor) -> Tensor:
    """True where a position (N, T - 1) predicts a token that counts: that of the label after it (N, T)."""
    return labels[:, 1:] != IGNORED


class LiveTeacher:
    """A dense model, run beside the student.

    Args:
        model: in eval mode, on the student's device.
        temperature: of both distributions.
        features: whether outputs of its blocks are wanted.
    """

    def __init__(self, model: PreTrainedModel, temperature: float, *, features: bool) -> None:
        self._model, self._temperature, self._features = model, temperature, features

    def dataset(self, examples: Sequence[Example]) -> list[Any]:
        return list(examples)

    def collate(self, items: Sequence[Any]) -> dict[str, Tensor]:
        return collate(items)

    @torch.no_grad()
    def lesson(self, batch: dict[str, Any]) -> Lesson:
        rows = predicted(batch["labels"])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        output = self._model(**inputs, use_cache=False, output_hidden_states=self._features)
        logits = output.logits[:, :-1][rows]
        features = tuple(one[:, :-1][rows] for one in output.hidden_states[1:]) if self._features else ()
        return Lesson(lambda student: divergence(student, logits, self._temperature), features)


class CachedTeacher:
    """What `spp cache-teacher` wrote.

    Args:
        folder: of the cache.
        manifest: that lies in it.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self._file = safe_open(folder / CACHE_FILE, framework="pt")
        self._temperature = float(manifest["temperature"])

    def dataset(self, examples: Sequence[Example]) -> list[Any]:
        starts = [0]
        for index, one in enumerate(examples, start=1):
            starts.append(starts[-1] + one.predictions if index % CACHED_TOGETHER else 0)
        return [(index, start, one) for index, (start, one) in enumerate(zip(starts, examples, strict=False))]

    def collate(self, items: Sequence[Any]) -> dict[str, Tensor]:
        batch = collate([one for _, _, one in items])
        for name in (_TOKENS, _LOG_PROBABILITIES):
            batch[name] = torch.cat([self._rows(name, *item) for item in items])
        return batch

    def _rows(self, name: str, index: int, start: int, example: Example) -> Tensor:
        rows: Any = self._file.get_slice(cached_name(name, index // CACHED_TOGETHER))
        return rows[start : start + example.predictions]

    def lesson(self, batch: dict[str, Any]) -> Lesson:
        tokens, log_probabilities = batch.pop(_TOKENS), batch.pop(_LOG_PROBABILITIES)
        return Lesson(lambda student: divergence_of_top(student, tokens, log_probabilities, self._temperature))


def cached_name(kind: str, part: int) -> str:
    """Name of a tensor in the cache."""
    return f"{kind}.{part}"


def cached_names(part: int) -> tuple[str, str]:
    """Names of the tokens, and of their log-probabilities."""
    return cached_name(_TOKENS, part), cached_name(_LOG_PROBABILITIES, part)


def open_teacher(
    options: TrainOptions, examples: Sequence[Example], vocabulary: int, device: torch.device
) -> Teacher | None:
    """The teacher that the options name, if they name one.

    Args:
        options: of the training run.
        examples: that it trains on.
        vocabulary: the student's.
        device: where a model is put.

    Raises:
        UsageError: the teacher has another vocabulary, or its cache was made for other examples or settings.
    """
    if options.teacher is None:
        return None
    folder = resolve_model(options.teacher)
    if (manifest := cache_manifest(folder)) is not None:
        _require_fit(options, manifest, examples, vocabulary)
        return CachedTeacher(folder, manifest)
    model = load_model(options.teacher, options, dtype=teacher_dtype(options.dtype, device)).requires_grad_(False)
    found = model.config.get_text_config().vocab_size
    _require_vocabulary(options.teacher, found, vocabulary)
    temperature = 1.0 if options.teacher_temperature is None else options.teacher_temperature
    return LiveTeacher(model, temperature, features=options.teacher_features > 0)


def teacher_dtype(asked: str, device: torch.device) -> torch.dtype:
    """What a teacher computes in: what is asked for; for `auto` fp32 on a CPU, else bf16."""
    dtype = compute_dtype(asked, device)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def cache_manifest(folder: Path) -> dict[str, Any] | None:
    """What a cache says of itself; None for any other folder."""
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    return manifest if manifest.get("kind") == CACHE_KIND else None


def _require_vocabulary(teacher: str, found: int, vocabulary: int) -> None:
    if found != vocabulary:
        raise UsageError(
            f"teacher {teacher} has a vocabulary of {found} tokens, and the model one of {vocabulary}; "
            "take the dense model that the sparse one was made from"
        )


def _require_fit(
    options: TrainOptions, manifest: Mapping[str, Any], examples: Sequence[Example], vocabulary: int
) -> None:
    teacher = str(options.teacher)
    _require_vocabulary(teacher, manifest["vocabulary"], vocabulary)
    if manifest["examples"] != digest(examples):
        raise UsageError(
            f"teacher {teacher} was asked about other examples; give spp cache-teacher the same --data, --window, "
            "--packing and --completion-only, and a teacher with the same tokenizer"
        )
    if options.teacher_temperature not in (None, manifest["temperature"]):
        raise UsageError(
            f"teacher {teacher} was asked at temperature {manifest['temperature']}, and not at "
            f"{options.teacher_temperature}; leave out --teacher-temperature, or ask again"
        )
    if options.teacher_features:
        raise UsageError("teacher-features needs a model as teacher; a cache has only its predictions")
