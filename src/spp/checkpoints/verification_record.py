"""The record of a merge's proof: which tensors it was made of, so that it holds for them and for no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp.checkpoints.checkpoint import Checkpoint
from spp.checkpoints.fingerprint import fingerprint, tensor_digests
from spp.checkpoints.json_files import read_object
from spp.errors import SppError

_BASE, _MODEL = "base", "model"

REPLACED = "replaced"
"""Key of a merged model's manifest and record: names of its tensors that training replaced whole, by dense weights."""


def replaced_tensors(manifest: Mapping[str, Any]) -> list[str]:
    """The names that a manifest or a record has there."""
    names = manifest.get(REPLACED)
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def digests_of(base: Mapping[str, str], model: Mapping[str, str]) -> dict[str, Any]:
    """The part of a record that says what it was made of: SHA-256 of every tensor before and after the merge."""
    return {"sha256": {_BASE: dict(base), _MODEL: dict(model)}}


@dataclass(frozen=True)
class RecordCheck:
    """A model beside a record.

    Attributes:
        problems: what is wrong, one sentence a tensor; empty where the model is the one that was proved.
        zeros: that the record counts.
        compared: tensors that both have.
        replaced: those that it says were replaced by dense weights, so that nothing is proved of them.
        sha256: fingerprint of the model.
    """

    problems: list[str]
    zeros: int
    compared: int
    replaced: list[str]
    sha256: str


def check_record(model: Checkpoint, path: Path) -> RecordCheck:
    """Whether a model's tensors are those that a record was made of; each is read once.

    Raises:
        UsageError: there is no such file.
        SppError: it is no record of a merge, or the model is damaged.
    """
    record = read_object(path)
    try:
        proved, zeros = dict(record["sha256"][_MODEL]), int(record["zeros"])
    except (KeyError, TypeError, ValueError):
        raise SppError(
            f"{path}: it is no record of spp merge, or one without digests of tensors; merge again"
        ) from None
    found = tensor_digests(model)
    problems = [] if record.get("verified") is True else [f"{path} says itself that nothing was proved"]
    problems += [
        f"{name}: the model has it, and it was not there when the proof was made"
        for name in found
        if name not in proved
    ]
    problems += [f"{name}: missing, and the proof was made with it" for name in proved if name not in found]
    problems += [
        f"{name}: it is not the tensor that the proof was made of"
        for name, digest in found.items()
        if proved.get(name, digest) != digest
    ]
    compared = len(found.keys() & proved.keys())
    return RecordCheck(problems, zeros, compared, replaced_tensors(record), fingerprint(model, found))
