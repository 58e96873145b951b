"""`spp pack`: write a sparse model without its zeros, and its survivors as they are, or in few bits.

In few bits, each survivor takes the nearest value, tensor by tensor; or, with calibration text, the model is quantized
block by block (`spp.pruning.quantize_blocks`), and a killed run goes on after the last finished block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp import ops
from spp._version import __version__
from spp.checkpoints.atomic_folder import check_output, new_folder, resumable_folder
from spp.checkpoints.checkpoint import MANIFEST, Checkpoint
from spp.checkpoints.fingerprint import model_digests
from spp.checkpoints.hub import resolve_model
from spp.checkpoints.json_files import write_json
from spp.checkpoints.options import PackOptions
from spp.checkpoints.pack import PackReport, PackWeight, size_of, write_archive
from spp.checkpoints.request import Request
from spp.errors import SppError, UsageError
from spp.models.blockwise.journal import FolderJournal
from spp.models.blockwise.streamed_blocks import StreamedBlocks
from spp.models.completeness import require_whole
from spp.models.loading import skeleton
from spp.ops.few_bits import FewBitWeight
from spp.ops.packed import WORTH_PACKING
from spp.pruning.calibration_text import read_calibration
from spp.pruning.few_bits.quantize import round_to_nearest
from spp.pruning.quantize_blocks import quantize_blocks
from spp.pruning.quantized_files import QuantizedFiles
from spp.runtime.devices import compute_dtype, pick_device


def pack(options: PackOptions) -> PackReport:
    """Write an archive to `options.out`, with every sparse matrix packed and all else unchanged (-0.0 becomes +0.0).

    Raises:
        UsageError: there is no model, it is an archive already, or none of its matrices is sparse enough.
        SppError: a damaged model, or a weight that few bits cannot hold.
    """
    start = time.perf_counter()
    source = Checkpoint.open(resolve_model(options.model, code=options.trust_remote_code))
    check_output(options.out, options.overwrite, inputs=(source.folder,))
    if source.packed:
        raise UsageError(f"{options.model} is a packed archive already; give the model that it was made from")
    with _packing(options, source) as (folder, pack_weight, few_bits):
        packed = write_archive(source, folder, pack_weight)
        facts: dict[str, Any] = {"tool": "spp", "version": __version__, "kind": "packed"}
        if options.bits is not None:
            facts["few_bits"] = {"bits": options.bits, "group": options.group, **few_bits}
        write_json(folder / MANIFEST, {**source.manifest, **facts})
    return PackReport(
        out=options.out,
        packed=packed,
        tensors=len(source.names),
        dense_bytes=size_of(source.shards),
        archive_bytes=size_of(options.out.glob("*.safetensors")),
        seconds=time.perf_counter() - start,
        bits=options.bits,
        errors={**few_bits.get("errors", {}), **few_bits.get("errors_of_outputs", {})},
    )


_Packing = tuple[Path, PackWeight, dict[str, Any]]
"""The folder to write to, how weights are packed, and what spp.json will say of few bits."""


def _packing(options: PackOptions, source: Checkpoint) -> AbstractContextManager[_Packing]:
    """Context manager in which an archive is written."""
    return _by_calibration(options, source) if options.calibration is not None else _by_weight(options)


@contextmanager
def _by_weight(options: PackOptions) -> Iterator[_Packing]:
    """Each weight by itself."""
    errors: dict[str, float] = {}
    few_bits = _to_nearest(options.bits, options.group, errors) if options.bits else None
    with new_folder(options.out, overwrite=options.overwrite) as folder:
        yield folder, few_bits or (lambda _, weight: ops.pack(weight)), {"errors": errors}


def _to_nearest(bits: int, group: int, errors: dict[str, float]) -> Callable[[str, Tensor], FewBitWeight]:
    """Packs weights in few bits, rounded to nearest, and notes their errors by name."""

    def pack_weight(name: str, weight: Tensor) -> FewBitWeight:
        try:
            quantized = round_to_nearest(weight, bits, group)
        except SppError as error:
            raise SppError(f"{name}: {error}") from error
        errors[name] = quantized.error(weight)
        return quantized.packed()

    return pack_weight


@contextmanager
def _by_calibration(options: PackOptions, source: Checkpoint) -> Iterator[_Packing]:
    """Block by block, with error feedback; what that leaves out is rounded to nearest."""
    assert options.calibration is not None and options.bits is not None
    source.require_unquantized("give the model as it was before quantization")
    device = pick_device(options.device)
    model = skeleton(source.folder, options, compute_dtype(options.dtype, device))
    require_whole(model, source)
    windows, facts = read_calibration(options, options.calibration, source.folder, model)
    inputs = {**model_digests(source.folder), "calibration text": facts.sha256}
    request = Request(options.of_the_result(), inputs, {"spp": __version__, "torch": torch.__version__})
    with (
        resumable_folder(options.out, request, overwrite=options.overwrite) as (folder, work),
        FolderJournal(work) as journal,
    ):
        blocks = StreamedBlocks(model, source, device)
        files = QuantizedFiles(work, journal, blocks.stored_whole())
        errors_of_outputs = quantize_blocks(
            blocks,
            windows,
            journal,
            files.write,
            bits=options.bits,
            group=options.group,
            least_zeros=WORTH_PACKING,
            parameters=files.parameters,
        )
        named = {files.parameters[name]: error for name, error in errors_of_outputs.items()}
        errors: dict[str, float] = {}
        others = _to_nearest(options.bits, options.group, errors)
        few_bits = {"calibration": asdict(facts), "errors_of_outputs": named, "errors": errors}
        yield folder, files.packing(others, options.bits, options.group), few_bits
