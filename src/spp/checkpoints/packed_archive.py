"""The packed archive: the safetensors files of a model with its sparse weights packed. This module defines the format.

Files are called `packed.safetensors`, or `packed-00001-of-00003.safetensors` and so on: never `model*.safetensors`, so
that no program mistakes them for dense ones. For a packed weight `NAME`, a file holds the tensors `NAME.values`,
`NAME.bitmask` and `NAME.row_offsets` (see `spp.ops.packed.PackedWeight`); all other tensors are as they were. The
file's metadata says `format: spp-packed`, the version of this schema, and in `weights`, as JSON, the shape of every
packed weight as it was stored, and whether that is (I, O) instead of (O, I).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spp import ops
from spp.checkpoints.safetensors_file import Header
from spp.errors import SppError, brief
from spp.ops.packed import PackedWeight, require_sound

FORMAT, VERSION = "spp-packed", "1"
_SINGLE = "packed.safetensors"
VALUES = "values"
_DIMENSIONS = {VALUES: 1, "bitmask": 2, "row_offsets": 1}
_PARTS = tuple(_DIMENSIONS)
_PART_OF = re.compile(r"packed-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class PackedEntry:
    """A packed weight in an archive.

    Attributes:
        shape: the shape in which the dense weight was stored.
        transposed: whether that is (I, O).
    """

    shape: tuple[int, int]
    transposed: bool

    @property
    def in_features(self) -> int:
        """I."""
        return self.shape[0] if self.transposed else self.shape[1]


def archive_files(folder: Path) -> list[Path]:
    """The files of an archive, in order; empty if the folder is not an archive.

    Raises:
        SppError: parts are missing.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    parts = {path: match for path in sorted(folder.iterdir()) if (match := _PART_OF.fullmatch(path.name))}
    totals = {int(match[2]) for match in parts.values()}
    if parts and (len(totals) > 1 or len(parts) != max(totals)):
        raise SppError(f"{folder}: {len(parts)} of {max(totals)} files of the packed archive are there; copy it again")
    return list(parts)


def part_name(index: int, count: int) -> str:
    """The name of file `index` (from 0) of `count` in an archive."""
    return _SINGLE if count == 1 else f"packed-{index + 1:05}-of-{count:05}.safetensors"


def dense_name(name: str) -> str:
    """The name of an archive's file after unpacking; other names stay."""
    return f"model{name.removeprefix('packed')}" if name == _SINGLE or _PART_OF.fullmatch(name) else name


def entries(path: Path, header: Header) -> dict[str, PackedEntry]:
    """The packed weights in a file of an archive, from its header.

    Raises:
        SppError: this version of spp does not read the file's version, or the file contradicts its metadata.
    """
    metadata = header.metadata
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise SppError(
            f"{path}: its metadata say format {metadata.get('format')!r}, version {metadata.get('version')!r}; "
            f"this spp reads {FORMAT!r}, version {VERSION!r}"
        )
    try:
        described = json.loads(metadata["weights"])
        found = {
            name: PackedEntry(tuple(int(size) for size in one["shape"]), bool(one["transposed"]))  # pyright: ignore[reportArgumentType]
            for name, one in described.items()
        }
        sound = all(len(entry.shape) == 2 and min(entry.shape) > 0 for entry in found.values())
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise SppError(f"{path}: its metadata do not describe packed weights ({brief(error)})") from error
    problems = [] if sound else ["bad shapes"]
    for name, part in itertools.product(found, _PARTS):
        if (layout := header.layouts.get(f"{name}.{part}")) is None:
            problems.append(f"{name}.{part} is missing")
        elif len(layout.shape) != _DIMENSIONS[part]:
            problems.append(
                f"{name}.{part} has the shape {layout.shape}, and {_DIMENSIONS[part]} dimensions are expected"
            )
    if problems:
        raise SppError(f"{path}: not a sound packed archive: {problems[0]}; copy the archive again, or pack again")
    return found


def plain_names(names: list[str], packed: dict[str, PackedEntry]) -> list[str]:
    """Tensor names of a file with each packed weight once, under its own name."""
    parts = {f"{name}.{part}" for name in packed for part in _PARTS}
    return [name for name in names if name not in parts] + list(packed)


def read_weight(read: Callable[[str], Tensor], name: str, entry: PackedEntry) -> PackedWeight:
    """A packed weight, checked; `read` gives a tensor of the file by name.

    Raises:
        SppError: lengths, bits and values contradict each other.
    """
    values, bitmask, row_offsets = (read(f"{name}.{part}") for part in _PARTS)
    weight = PackedWeight(values, bitmask, row_offsets, entry.in_features)
    rows = entry.shape[1] if entry.transposed else entry.shape[0]
    if bitmask.ndim != 2 or len(bitmask) != rows:
        raise SppError(f"{name}: the bitmask is {tuple(bitmask.shape)}, and {rows} rows are expected; it is damaged")
    require_sound(weight, name)
    return weight


def dense(weight: PackedWeight, entry: PackedEntry) -> Tensor:
    """The weight as it was stored."""
    whole = ops.unpack(weight)
    return whole.T.contiguous() if entry.transposed else whole


def packed_tensors(name: str, tensor: Tensor, *, transposed: bool) -> tuple[dict[str, Tensor], PackedEntry]:
    """The tensors of an archive for a weight, by name, and the entry that describes the weight."""
    rows, columns = tensor.shape
    weight = ops.pack(tensor.T.contiguous() if transposed else tensor)
    parts = dict(zip(_PARTS, (weight.values, weight.bitmask, weight.row_offsets), strict=True))
    return {f"{name}.{part}": value for part, value in parts.items()}, PackedEntry((rows, columns), transposed)


def metadata(packed: dict[str, PackedEntry]) -> dict[str, str]:
    """The metadata of a file that holds these weights."""
    weights: dict[str, Any] = {
        name: {"shape": list(entry.shape), "transposed": entry.transposed} for name, entry in packed.items()
    }
    return {"format": FORMAT, "version": VERSION, "weights": json.dumps(weights)}
