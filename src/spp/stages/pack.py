"""Write a sparse model as a packed archive, and a packed archive as plain safetensors: tensor by tensor, bit by bit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from spp import __version__, archive
from spp.archive import PackedEntry
from spp.checkpoint import (
    MANIFEST,
    Checkpoint,
    canonical_zeros,
    check_output,
    is_float,
    new_folder,
    resolve_model,
    write_json,
)
from spp.errors import UsageError
from spp.options import PackOptions, UnpackOptions
from spp.packing import WORTH_PACKING
from spp.progress import track
from spp.rewriting import rewrite, write_companions


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """The result of `pack` and `unpack`.

    Attributes:
        packed: weights that are packed in the archive.
        tensors: all tensors of the model.
        dense_bytes, archive_bytes: of all tensors, as plain safetensors and in the archive.
    """

    out: Path
    packed: int
    tensors: int
    dense_bytes: int
    archive_bytes: int
    seconds: float


def pack(options: PackOptions) -> PackReport:
    """Write `options.out`: an archive with every sparse matrix packed, and all else as it is (but -0.0, now +0.0).

    Raises:
        UsageError: no model is there, it is an archive already, or none of its matrices is sparse enough.
        SppError: a damaged model.
    """
    start = time.perf_counter()
    source = Checkpoint.open(resolve_model(options.model))
    check_output(options.out, options.overwrite, inputs=(source.folder,))
    if source.packed:
        raise UsageError(f"{options.model} is a packed archive already")
    entries: dict[str, PackedEntry] = {}
    sizes = _Sizes()
    with new_folder(options.out, overwrite=options.overwrite) as folder:
        shards = source.shards
        for index, names in enumerate(track(shards.values(), "packing", total=len(shards))):
            held: dict[str, Tensor] = {}
            in_file: dict[str, PackedEntry] = {}
            for name in names:
                tensor = canonical_zeros(source.tensor(name))
                sizes.dense += tensor.nbytes
                if _is_sparse(tensor):
                    parts, in_file[name] = archive.packed_tensors(name, tensor, transposed=source.transposed(name))
                    held |= parts
                else:
                    held[name] = tensor
            sizes.archive += sum(tensor.nbytes for tensor in held.values())
            save_file(held, folder / archive.part_name(index, len(shards)), metadata=archive.metadata(in_file))
            entries |= in_file
        if not entries:
            raise UsageError(
                f"{options.model} has no matrix with {WORTH_PACKING:.0%} zeros or more; packing would not make it "
                "smaller. Prune it first (spp prune)"
            )
        write_companions(source, folder)
        write_json(folder / MANIFEST, {**source.manifest, "tool": "spp", "version": __version__, "kind": "packed"})
    return PackReport(
        out=options.out,
        packed=len(entries),
        tensors=len(source.names),
        dense_bytes=sizes.dense,
        archive_bytes=sizes.archive,
        seconds=time.perf_counter() - start,
    )


def unpack(options: UnpackOptions) -> PackReport:
    """Write `options.out`: the model of an archive as plain safetensors, which load anywhere.

    Raises:
        UsageError: no archive is there.
        SppError: it is damaged.
    """
    start = time.perf_counter()
    source = Checkpoint.open(resolve_model(options.model))
    check_output(options.out, options.overwrite, inputs=(source.folder,))
    if not source.packed:
        raise UsageError(f"{options.model} is no packed archive; it holds plain safetensors already")
    with new_folder(options.out, overwrite=options.overwrite) as folder:
        rewrite(source, folder, {}, "unpacking")
        write_json(folder / MANIFEST, {**source.manifest, "version": __version__, "kind": "unpacked"})
        dense_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return PackReport(
        out=options.out,
        packed=len(source.packed),
        tensors=len(source.names),
        dense_bytes=dense_bytes,
        archive_bytes=sum(path.stat().st_size for path in source.shards),
        seconds=time.perf_counter() - start,
    )


@dataclass
class _Sizes:
    dense: int = 0
    archive: int = 0


def _is_sparse(tensor: Tensor) -> bool:
    if tensor.ndim != 2 or not is_float(tensor) or not tensor.numel():
        return False
    return 1 - int(tensor.count_nonzero()) / tensor.numel() >= WORTH_PACKING
