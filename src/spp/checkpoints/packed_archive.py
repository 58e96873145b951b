"""The packed archive: the safetensors files of a model with its sparse weights packed. This module defines the format.

Files are called `packed.safetensors`, or `packed-00001-of-00003.safetensors` and so on: never `model*.safetensors`, so
that no program mistakes them for dense ones. For a packed weight `NAME`, a file holds the tensors `NAME.values`,
`NAME.bitmask` and `NAME.row_offsets` (see `spp.ops.packed.PackedWeight`), or, in few bits, `NAME.codes`,
`NAME.bitmask`, `NAME.row_offsets`, `NAME.scales` and `NAME.codebook` (see `spp.ops.few_bits.FewBitWeight`); all other
tensors are as they were. The file's metadata says `format: spp-packed`, the version of this schema, and in `weights`,
as JSON, the shape of every packed weight as it was stored, whether that is (I, O) instead of (O, I), and in few bits
`bits`, `group`, and the `dtype` that the weight had.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp import ops
from spp.checkpoints.safetensors_file import Header
from spp.errors import SppError, brief
from spp.ops.dtypes import FLOATS
from spp.ops.few_bits import BITS, GROUPS, FewBitWeight
from spp.ops.packed import PackedWeight, require_sound

FORMAT, VERSION = "spp-packed", "1"
_SINGLE = "packed.safetensors"
VALUES = "values"
_DIMENSIONS = {VALUES: 1, "bitmask": 2, "row_offsets": 1}
_FEW_BIT_DIMENSIONS = {"codes": 1, "bitmask": 2, "row_offsets": 1, "scales": 2, "codebook": 1}
_DTYPES = {one.safetensors: dtype for dtype, one in FLOATS.items()}
_PART_OF = re.compile(r"packed-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class FewBits:
    """How the survivors of a packed weight are stored in few bits.

    Attributes:
        bits, group: see `spp.ops.few_bits.FewBitWeight`.
        dtype: the dtype that the weight had, and has when it is unpacked, by its safetensors name.
    """

    bits: int
    group: int
    dtype: str


@dataclass(frozen=True)
class PackedEntry:
    """A packed weight in an archive.

    Attributes:
        shape: the shape in which the dense weight was stored.
        transposed: whether that is (I, O).
        few_bits: None where its values are floats.
    """

    shape: tuple[int, int]
    transposed: bool
    few_bits: FewBits | None = None

    @property
    def dimensions(self) -> dict[str, int]:
        """Last part of the name of each tensor that it is stored as -> number of its dimensions."""
        return _FEW_BIT_DIMENSIONS if self.few_bits else _DIMENSIONS

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
        found = {name: _entry(one) for name, one in described.items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise SppError(f"{path}: its metadata do not describe packed weights ({brief(error)})") from error
    if problem := next(_problems(found, header), None):
        raise SppError(f"{path}: not a sound packed archive: {problem}; copy the archive again, or pack again")
    return found


def _entry(described: Mapping[str, Any]) -> PackedEntry:
    """A weight from what the metadata say of it."""
    few_bits = None
    if "bits" in described:
        few_bits = FewBits(int(described["bits"]), int(described["group"]), str(described["dtype"]))
    shape = tuple(int(size) for size in described["shape"])
    return PackedEntry(shape, bool(described["transposed"]), few_bits)  # pyright: ignore[reportArgumentType]


def _problems(found: dict[str, PackedEntry], header: Header) -> Iterator[str]:
    """What does not fit together in a file's header."""
    for name, entry in found.items():
        if len(entry.shape) != 2 or min(entry.shape) < 1:
            yield f"{name} has the bad shape {entry.shape}"
        few = entry.few_bits
        if few and (few.bits not in BITS or few.group not in GROUPS or few.dtype not in _DTYPES):
            yield (
                f"{name} has {few.bits} bits in groups of {few.group} for {few.dtype}; known are "
                f"{', '.join(map(str, BITS))} bits, groups of {' and '.join(map(str, GROUPS))}, {', '.join(_DTYPES)}"
            )
        for part, dimensions in entry.dimensions.items():
            if (layout := header.layouts.get(f"{name}.{part}")) is None:
                yield f"{name}.{part} is missing"
            elif len(layout.shape) != dimensions:
                yield f"{name}.{part} has the shape {layout.shape}, and {dimensions} dimensions are expected"


def plain_names(names: list[str], packed: dict[str, PackedEntry]) -> list[str]:
    """Tensor names of a file with each packed weight once, under its own name."""
    parts = {f"{name}.{part}" for name, entry in packed.items() for part in entry.dimensions}
    return [name for name in names if name not in parts] + list(packed)


def read_weight(read: Callable[[str], Tensor], name: str, entry: PackedEntry) -> PackedWeight | FewBitWeight:
    """A packed weight, checked; `read` gives a tensor of the file by name.

    Raises:
        SppError: lengths, bits and values contradict each other.
    """
    parts = {part: read(f"{name}.{part}") for part in entry.dimensions}
    bitmask, rows = parts["bitmask"], entry.shape[1] if entry.transposed else entry.shape[0]
    if bitmask.ndim != 2 or len(bitmask) != rows:
        raise SppError(f"{name}: the bitmask is {tuple(bitmask.shape)}, and {rows} rows are expected; it is damaged")
    if few := entry.few_bits:
        return FewBitWeight.from_tensors(parts, entry.in_features, few.bits, few.group, name)
    weight = PackedWeight(parts[VALUES], bitmask, parts["row_offsets"], entry.in_features)
    require_sound(weight, name)
    return weight


def dense(weight: PackedWeight | FewBitWeight, entry: PackedEntry) -> Tensor:
    """The weight as it was stored."""
    if isinstance(weight, FewBitWeight):
        assert entry.few_bits is not None
        whole = weight.unpack(_DTYPES[entry.few_bits.dtype])
    else:
        whole = ops.unpack(weight)
    return whole.T.contiguous() if entry.transposed else whole


def packed_tensors(
    name: str, weight: PackedWeight | FewBitWeight, dtype: torch.dtype, *, transposed: bool
) -> tuple[dict[str, Tensor], PackedEntry]:
    """The tensors of an archive for a weight (O, I), by name, and the entry that describes the weight.

    Args:
        name: of the weight.
        weight: packed.
        dtype: that it had before.
        transposed: whether it was stored as (I, O).
    """
    few_bits = None
    if isinstance(weight, FewBitWeight):
        few_bits = FewBits(weight.bits, weight.group, FLOATS[dtype].safetensors)
    rows, columns = weight.shape
    entry = PackedEntry((columns, rows) if transposed else (rows, columns), transposed, few_bits)
    return {f"{name}.{part}": getattr(weight, part) for part in entry.dimensions}, entry


def metadata(packed: dict[str, PackedEntry]) -> dict[str, str]:
    """The metadata of a file that holds these weights."""
    weights: dict[str, Any] = {
        name: {"shape": list(entry.shape), "transposed": entry.transposed}
        | (asdict(entry.few_bits) if entry.few_bits else {})
        for name, entry in packed.items()
    }
    return {"format": FORMAT, "version": VERSION, "weights": json.dumps(weights)}
