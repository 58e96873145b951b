"""Write the files of a packed archive, and `spp unpack`: an archive as plain safetensors. Tensor by tensor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from spp._version import __version__
from spp.checkpoints import packed_archive
from spp.checkpoints.atomic_folder import check_output, new_folder
from spp.checkpoints.checkpoint import MANIFEST, Checkpoint
from spp.checkpoints.hub import resolve_model
from spp.checkpoints.json_files import write_json
from spp.checkpoints.options import UnpackOptions
from spp.checkpoints.packed_archive import PackedEntry
from spp.checkpoints.rewrite import Rewriting, write_companions
from spp.checkpoints.safetensors_file import save_tensors
from spp.errors import UsageError
from spp.ops.few_bits import FewBitWeight
from spp.ops.packed import WORTH_PACKING, PackedWeight, zero_share
from spp.ops.zeros import canonical_zeros, is_float
from spp.runtime.progress import track


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """The result of `pack` and `unpack`.

    Attributes:
        packed: number of packed weights in the archive.
        tensors: number of all tensors of the model.
        dense_bytes, archive_bytes: size of the files as plain safetensors, and as an archive.
        bits: of each survivor that was packed in few bits; None if they are as they were.
        errors: name of each weight in few bits -> how much its numbers, or with calibration its layer's outputs, are
            off: the root of the squared error as a share of the root of their squares.
    """

    out: Path
    packed: int
    tensors: int
    dense_bytes: int
    archive_bytes: int
    seconds: float
    bits: int | None = None
    errors: dict[str, float] = field(default_factory=dict)


PackWeight = Callable[[str, Tensor], PackedWeight | FewBitWeight]
"""Name of a sparse weight, and the weight (O, I) with +0.0 only -> the weight without its zeros."""


def write_archive(source: Checkpoint, folder: Path, pack_weight: PackWeight) -> int:
    """Write the files of a packed archive, with every sparse matrix packed and all else unchanged (-0.0 becomes +0.0).

    Args:
        source: the model, with plain safetensors.
        folder: where to.
        pack_weight: see `PackWeight`.

    Returns:
        How many weights are packed.

    Raises:
        UsageError: the model is an archive already, or none of its matrices is sparse enough.
        SppError: a damaged model.
    """
    packed, shards = 0, source.shards
    for index, names in enumerate(track(shards.values(), "packing", total=len(shards))):
        held, entries = _packed_shard(source, names, pack_weight)
        part = folder / packed_archive.part_name(index, len(shards))
        save_tensors(part, held, packed_archive.metadata(entries))
        packed += len(entries)
    if not packed:
        raise UsageError(
            f"{source.folder} has no matrix with {WORTH_PACKING:.0%} zeros or more; packing would not make it "
            "smaller. Prune it first (spp prune)"
        )
    write_companions(source, folder)
    return packed


def _packed_shard(
    source: Checkpoint, names: list[str], pack_weight: PackWeight
) -> tuple[dict[str, Tensor], dict[str, PackedEntry]]:
    """The tensors of a file of the archive, and its packed weights."""
    held: dict[str, Tensor] = {}
    entries: dict[str, PackedEntry] = {}
    for name in names:
        tensor = canonical_zeros(source.tensor(name))
        if is_worth_packing(tensor):
            transposed = source.transposed(name)
            weight = pack_weight(name, tensor.T.contiguous() if transposed else tensor)
            parts, entries[name] = packed_archive.packed_tensors(name, weight, tensor.dtype, transposed=transposed)
            held |= parts
        else:
            held[name] = tensor
    return held, entries


def unpack(options: UnpackOptions) -> PackReport:
    """Write the model of an archive to `options.out`, as plain safetensors, which load anywhere.

    Raises:
        UsageError: there is no archive.
        SppError: the archive is damaged.
    """
    start = time.perf_counter()
    source = Checkpoint.open(resolve_model(options.model))
    check_output(options.out, options.overwrite, inputs=(source.folder,))
    if not source.packed:
        raise UsageError(f"{options.model} is no packed archive; it holds plain safetensors already")
    with new_folder(options.out, overwrite=options.overwrite) as folder:
        files = Rewriting(source, folder)
        for name in track(source.names, "unpacking"):
            files.copy(name)
        files.finish()
        write_json(folder / MANIFEST, {**source.manifest, "version": __version__, "kind": "unpacked"})
    return PackReport(
        out=options.out,
        packed=len(source.packed),
        tensors=len(source.names),
        dense_bytes=size_of(options.out.glob("*.safetensors")),
        archive_bytes=size_of(source.shards),
        seconds=time.perf_counter() - start,
    )


def size_of(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def is_worth_packing(tensor: Tensor) -> bool:
    """Whether a tensor is a matrix of floats with so many zeros that it is packed."""
    if tensor.ndim != 2 or not is_float(tensor) or not tensor.numel():
        return False
    return zero_share(tensor) >= WORTH_PACKING
