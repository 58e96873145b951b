"""Teachers for distillation: a dense model, or its stored predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from spp.checkpoints.checkpoint import MANIFEST
from spp.checkpoints.fingerprint import folder_digest
from spp.checkpoints.hub import resolve_model
from spp.checkpoints.json_files import read_object
from spp.data.examples import IGNORED, Example, digest
from spp.errors import SppError, UsageError, shown
from spp.models.loading import load_config, load_model
from spp.ops.zeros import all_finite
from spp.options import LoadingOptions
from spp.runtime.devices import training_dtype
from spp.runtime.files import reading
from spp.training.distillation_loss import divergence, divergence_of_top
from spp.training.options import TrainOptions
from spp.training.sharding import divide

CACHE_FILE = "teacher.safetensors"
CACHE_KIND = "teacher-cache"
CACHED_TOGETHER = 64
"""Examples whose distributions are one tensor in the cache."""

_KINDS = ("tokens", "log_probabilities")
_ASK_AGAIN = "it is truncated or damaged: copy it again, or ask the teacher again with spp cache-teacher"


@dataclass(frozen=True)
class TeacherBatch:
    """A teacher's part in the loss of a batch.

    Attributes:
        divergence: the student's logits of all predicted tokens, (N, V) -> the sum of their divergences, a scalar.
        features: outputs of the teacher's blocks at the predicted tokens, (N, H) each; empty if they are not wanted.
    """

    divergence: Callable[[Tensor], Tensor]
    features: tuple[Tensor, ...] = ()


class Teacher(Protocol):
    """A source of `TeacherBatch`es."""

    def teacher_batch(self, batch: dict[str, Any], examples: Sequence[int]) -> TeacherBatch:
        """The teacher's part in the loss of a batch.

        Args:
            batch: input_ids, attention_mask and labels, (N, T) each.
            examples: indices of the batch's examples in the data, (N,).
        """
        ...


def predicted(labels: Tensor) -> Tensor:
    """True where a position (N, T - 1) predicts a token that counts: that of the label after it (N, T)."""
    return labels[:, 1:] != IGNORED


class LiveTeacher:
    """A dense model, run beside the student.

    Args:
        model: in eval mode, on the student's device, or on the CPU until `divide` is called.
        temperature: temperature of both distributions.
        features: whether the outputs of its blocks are needed.
    """

    def __init__(self, model: PreTrainedModel, temperature: float, *, features: bool) -> None:
        self._model, self._temperature, self._features = model, temperature, features

    def divide(self, device: torch.device) -> None:
        """Shard the model over the processes, as FSDP does with the student."""
        divide(self._model, device)

    @torch.no_grad()
    def teacher_batch(self, batch: dict[str, Any], examples: Sequence[int]) -> TeacherBatch:
        rows = predicted(batch["labels"])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        output = self._model(**inputs, use_cache=False, output_hidden_states=self._features)
        logits = output.logits[:, :-1][rows]
        features = tuple(one[:, :-1][rows] for one in output.hidden_states[1:]) if self._features else ()
        return TeacherBatch(lambda student: divergence(student, logits, self._temperature), features)


class CachedTeacher:
    """A teacher from the cache that `spp cache-teacher` wrote.

    Args:
        folder: the cache's folder.
        temperature: temperature of the stored distributions.
        examples: all examples in the cache.
        vocabulary: size of the student's vocabulary.

    Raises:
        SppError: the cache is truncated or damaged, or does not hold these examples.
    """

    def __init__(self, folder: Path, temperature: float, examples: Sequence[Example], vocabulary: int) -> None:
        self._path, self._vocabulary = folder / CACHE_FILE, vocabulary
        with reading(self._path, "a whole teacher cache", _ASK_AGAIN):
            self._file = safe_open(self._path, framework="pt")
        self._temperature = temperature
        self._rows: list[slice] = []  # of each example in its part
        end = 0
        for index, one in enumerate(examples):
            start = end if index % CACHED_TOGETHER else 0
            end = start + one.predictions
            self._rows.append(slice(start, end))
        with reading(self._path, "the cache of these examples", _ASK_AGAIN):
            self._check_parts()

    def _check_parts(self) -> None:
        """Check that every part has a row for each prediction of its examples."""
        for first in range(0, len(self._rows), CACHED_TOGETHER):
            last = self._rows[min(first + CACHED_TOGETHER, len(self._rows)) - 1]
            shapes = [self._file.get_slice(name).get_shape() for name in cached_names(first // CACHED_TOGETHER)]
            if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != last.stop or not shapes[0][1]:
                raise ValueError(
                    f"part {first // CACHED_TOGETHER} is {shapes[0]} and {shapes[1]} for {last.stop} tokens"
                )

    def teacher_batch(self, batch: dict[str, Any], examples: Sequence[int]) -> TeacherBatch:
        device = batch["labels"].device
        with reading(self._path, "a whole teacher cache", _ASK_AGAIN):
            tokens, log_probabilities = (
                torch.cat([self._read(kind, example) for example in examples]) for kind in _KINDS
            )
            self._require_sound(tokens, log_probabilities)
        tokens, log_probabilities = tokens.to(device), log_probabilities.to(device)
        return TeacherBatch(lambda student: divergence_of_top(student, tokens, log_probabilities, self._temperature))

    def _require_sound(self, tokens: Tensor, log_probabilities: Tensor) -> None:
        if tokens.is_floating_point() or not log_probabilities.is_floating_point():
            raise ValueError(f"tokens are {tokens.dtype}, and log-probabilities {log_probabilities.dtype}")
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocabulary:
            raise ValueError(f"it holds a token that is none of the model's {self._vocabulary}")
        if not all_finite(log_probabilities):
            raise ValueError("a log-probability is NaN or infinite")

    def _read(self, kind: str, example: int) -> Tensor:
        rows: Any = self._file.get_slice(f"{kind}.{example // CACHED_TOGETHER}")
        return rows[self._rows[example]]


def cached_names(part: int) -> tuple[str, str]:
    """Names in the cache of the tokens of a part, and of their log-probabilities."""
    tokens, log_probabilities = (f"{kind}.{part}" for kind in _KINDS)
    return tokens, log_probabilities


def open_teacher(
    options: TrainOptions, examples: Sequence[Example], vocabulary: int, device: torch.device
) -> Teacher | None:
    """The teacher that the options name, if they name one.

    Args:
        options: options of the training run.
        examples: all examples, including those held out.
        vocabulary: size of the student's vocabulary.
        device: device for a model.

    Raises:
        UsageError: the teacher has another vocabulary, or its cache was made for other examples or settings.
    """
    if options.teacher is None:
        return None
    folder = resolve_model(options.teacher, code=options.trust_remote_code)
    if (manifest := cache_manifest(folder)) is not None:
        _require_fit(options, manifest, examples, vocabulary)
        return CachedTeacher(folder, manifest["temperature"], examples, vocabulary)
    dtype = teacher_dtype(options, folder, device)
    place = "cpu" if options.sharding == "fsdp" else None  # until it is divided
    model = load_model(folder, options, dtype=dtype, device=place).requires_grad_(False)
    found = model.config.get_text_config().vocab_size
    _require_vocabulary(options.teacher, found, vocabulary)
    temperature = 1.0 if options.teacher_temperature is None else options.teacher_temperature
    return LiveTeacher(model, temperature, features=options.teacher_features > 0)


def check_teacher(options: TrainOptions, vocabulary: int) -> None:
    """Refuse a teacher that is not there, or has another vocabulary than the student, before anything is loaded.

    Raises:
        UsageError: see above.
        SppError: its files are damaged.
    """
    if options.teacher is None:
        return
    folder = resolve_model(options.teacher, code=options.trust_remote_code)
    manifest = cache_manifest(folder)
    own = manifest["vocabulary"] if manifest else load_config(folder, options).get_text_config().vocab_size
    _require_vocabulary(options.teacher, own, vocabulary)


def teacher_digest(options: TrainOptions) -> str | None:
    """A digest of all files of the teacher that the options name, a model's or a cache's; None without a teacher."""
    if options.teacher is None:
        return None
    return folder_digest(resolve_model(options.teacher, code=options.trust_remote_code))


def teacher_dtype(options: LoadingOptions, folder: Path, device: torch.device) -> torch.dtype:
    """The dtype that the teacher in `folder` computes in: as in training, but for `auto` bf16 on an accelerator."""
    dtype = training_dtype(options.dtype, device, load_config(folder, options).dtype)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def cache_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a cache; None for any other folder.

    Raises:
        SppError: it is damaged.
    """
    manifest = read_object(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    if manifest.get("kind") != CACHE_KIND:
        return None
    found = {name: manifest.get(name) for name in ("vocabulary", "temperature", "examples")}
    whole = isinstance(found["vocabulary"], int) and isinstance(found["examples"], str)
    if not whole or not isinstance(found["temperature"], int | float) or not 0 < found["temperature"] < math.inf:
        raise SppError(f"{folder / MANIFEST}: not the manifest of a teacher cache, with {shown(found)}; {_ASK_AGAIN}")
    return manifest


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
            "--max-tokens, --join-documents and --completion-only, and a teacher with the same tokenizer"
        )
    if options.teacher_temperature not in (None, manifest["temperature"]):
        raise UsageError(
            f"teacher {teacher} was asked at temperature {manifest['temperature']}, and not at "
            f"{options.teacher_temperature}; leave out --teacher-temperature, or ask again"
        )
    if options.teacher_features:
        raise UsageError("teacher-features needs a model as teacher; a cache has only its predictions")
