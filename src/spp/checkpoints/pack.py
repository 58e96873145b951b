"""Write a sparse model as a packed archive, and a packed archive as plain safetensors: tensor by tensor, bit by bit."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from spp._version import __version__
from spp.checkpoints import packed_archive
from spp.checkpoints.atomic_folder import check_output, new_folder
from spp.checkpoints.checkpoint import MANIFEST, Checkpoint
from spp.checkpoints.hub import resolve_model
from spp.checkpoints.json_files import write_json
from spp.checkpoints.options import PackOptions, UnpackOptions
from spp.checkpoints.packed_archive import PackedEntry
from spp.checkpoints.rewrite import Rewriting, write_companions
from spp.checkpoints.safetensors_file import save_tensors
from spp.errors import UsageError
from spp.ops.packed import WORTH_PACKING, zero_share
from spp.ops.zeros import canonical_zeros, is_float
from spp.runtime.progress import track


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """The result of `pack` and `unpack`.

    Attributes:
        packed: number of packed weights in the archive.
        tensors: number of all tensors of the model.
        dense_bytes, archive_bytes: size of the files as plain safetensors, and as an archive.
    """

    out: Path
    packed: int
    tensors: int
    dense_bytes: int
    archive_bytes: int
    seconds: float


def pack(options: PackOptions) -> PackReport:
    """Write an archive to `options.out`, with every sparse matrix packed and all else unchanged (-0.0 becomes +0.0).

    Raises:
        UsageError: there is no model, it is an archive already, or none of its matrices is sparse enough.
        SppError: a damaged model.
    """
    start = time.perf_counter()
    source = Checkpoint.open(resolve_model(options.model))
    check_output(options.out, options.overwrite, inputs=(source.folder,))
    if source.packed:
        raise UsageError(f"{options.model} is a packed archive already")
    packed = 0
    with new_folder(options.out, overwrite=options.overwrite) as folder:
        shards = source.shards
        for index, names in enumerate(track(shards.values(), "packing", total=len(shards))):
            held, entries = _packed_shard(source, names)
            part = folder / packed_archive.part_name(index, len(shards))
            save_tensors(part, held, packed_archive.metadata(entries))
            packed += len(entries)
        if not packed:
            raise UsageError(
                f"{options.model} has no matrix with {WORTH_PACKING:.0%} zeros or more; packing would not make it "
                "smaller. Prune it first (spp prune)"
            )
        write_companions(source, folder)
        write_json(folder / MANIFEST, {**source.manifest, "tool": "spp", "version": __version__, "kind": "packed"})
    return PackReport(
        out=options.out,
        packed=packed,
        tensors=len(source.names),
        dense_bytes=_size(source.shards),
        archive_bytes=_size(options.out.glob("*.safetensors")),
        seconds=time.perf_counter() - start,
    )


def _packed_shard(source: Checkpoint, names: list[str]) -> tuple[dict[str, Tensor], dict[str, PackedEntry]]:
    """The tensors of a file of the archive, and its packed weights."""
    held: dict[str, Tensor] = {}
    entries: dict[str, PackedEntry] = {}
    for name in names:
        tensor = canonical_zeros(source.tensor(name))
        if _is_sparse(tensor):
            parts, entries[name] = packed_archive.packed_tensors(name, tensor, transposed=source.transposed(name))
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
        dense_bytes=_size(options.out.glob("*.safetensors")),
        archive_bytes=_size(source.shards),
        seconds=time.perf_counter() - start,
    )


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _is_sparse(tensor: Tensor) -> bool:
    if tensor.ndim != 2 or not is_float(tensor) or not tensor.numel():
        return False
    return zero_share(tensor) >= WORTH_PACKING
