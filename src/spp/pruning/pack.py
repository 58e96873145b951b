"""`spp pack`: write a sparse model without its zeros, and its survivors as they are, or in few bits."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from spp import ops
from spp._version import __version__
from spp.checkpoints.atomic_folder import check_output, new_folder
from spp.checkpoints.checkpoint import MANIFEST, Checkpoint
from spp.checkpoints.hub import resolve_model
from spp.checkpoints.json_files import write_json
from spp.checkpoints.options import PackOptions
from spp.checkpoints.pack import PackReport, size_of, write_archive
from spp.errors import SppError, UsageError
from spp.ops.few_bits import FewBitWeight
from spp.ops.packed import PackedWeight
from spp.pruning.few_bits.quantize import round_to_nearest


def pack(options: PackOptions) -> PackReport:
    """Write an archive to `options.out`, with every sparse matrix packed and all else unchanged (-0.0 becomes +0.0).

    Raises:
        UsageError: there is no model, it is an archive already, or none of its matrices is sparse enough.
        SppError: a damaged model, or a weight that few bits cannot hold.
    """
    start = time.perf_counter()
    source = Checkpoint.open(resolve_model(options.model))
    check_output(options.out, options.overwrite, inputs=(source.folder,))
    if source.packed:
        raise UsageError(f"{options.model} is a packed archive already; give the model that it was made from")
    packing = _Packing(options)
    with new_folder(options.out, overwrite=options.overwrite) as folder:
        packed = write_archive(source, folder, packing.pack_weight)
        write_json(folder / MANIFEST, {**source.manifest, **packing.manifest()})
    return PackReport(
        out=options.out,
        packed=packed,
        tensors=len(source.names),
        dense_bytes=size_of(source.shards),
        archive_bytes=size_of(options.out.glob("*.safetensors")),
        seconds=time.perf_counter() - start,
        bits=options.bits,
        errors=packing.errors,
    )


class _Packing:
    """Packs weights one by one.

    Attributes:
        errors: name of each weight in few bits -> its error; see `PackReport`.
    """

    def __init__(self, options: PackOptions) -> None:
        self._options = options
        self.errors: dict[str, float] = {}

    def pack_weight(self, name: str, weight: Tensor) -> PackedWeight | FewBitWeight:
        """See `spp.checkpoints.pack.PackWeight`."""
        if self._options.bits is None:
            return ops.pack(weight)
        try:
            quantized = round_to_nearest(weight, self._options.bits, self._options.group)
        except SppError as error:
            raise SppError(f"{name}: {error}") from error
        self.errors[name] = quantized.error(weight)
        return quantized.packed()

    def manifest(self) -> dict[str, Any]:
        """What spp.json says of the archive."""
        facts: dict[str, Any] = {"tool": "spp", "version": __version__, "kind": "packed"}
        if self._options.bits is not None:
            few_bits = {"bits": self._options.bits, "group": self._options.group, "errors": self.errors}
            facts["few_bits"] = few_bits
        return facts
