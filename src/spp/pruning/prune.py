"""`spp prune`: prune a dense model with calibration text, and write its files with zeros in them.

The model is never in memory as a whole: its blocks are read, pruned and written one after the other, and a killed run
resumes after the last finished block. The model computes in the dtype of the options; the files keep their own.
Weights that pruning does not change are written bit for bit.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spp._version import __version__
from spp.checkpoints.atomic_folder import check_output, partial_folder, resumable_folder, work_folder
from spp.checkpoints.checkpoint import MANIFEST, Checkpoint
from spp.checkpoints.fingerprint import model_digests
from spp.checkpoints.hub import resolve_model
from spp.checkpoints.json_files import write_json
from spp.checkpoints.model_card import read_licence
from spp.checkpoints.request import Request
from spp.errors import SppError, UsageError
from spp.models.architecture import unreached_weights
from spp.models.blockwise.journal import FolderJournal
from spp.models.completeness import require_whole
from spp.models.loading import skeleton
from spp.models.weight_map import Part
from spp.patterns import Unstructured
from spp.pruning.calibration_text import CalibrationFacts, read_calibration
from spp.pruning.engine import matrices_to_prune, needs_calibration, prune_blocks, pruned_parameters
from spp.pruning.options import BlockPart, PruneOptions, PruningSettings
from spp.pruning.prune_block import BlockResult
from spp.pruning.pruned_blocks import PrunedBlocks
from spp.pruning.pruned_files import PrunedFiles, TensorFacts
from spp.pruning.reconstruction import Fit
from spp.runtime import distributed
from spp.runtime.devices import compute_dtype, pick_device
from spp.runtime.memory import return_freed_memory

logger = logging.getLogger("spp")

_DEFAULT_TEXT = "python-stdlib"
_WORTH_A_NOTE = 0.01
# What may differ between a run that was killed and the one that goes on with it: where, not what.


@dataclass(frozen=True)
class TensorSparsity:
    """A pruned tensor in the file.

    Attributes:
        sparsity: share of zeros.
        transposed: whether the file holds it as (I, O) instead of (O, I).
    """

    sparsity: float
    transposed: bool


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """The result of `prune`.

    Attributes:
        pattern: the requested pattern; if existing zeros were kept (keep_zeros), the detected one.
        criterion: None if existing zeros were kept.
        settings: all settings of the run.
        sparsity: share of zeros over all pruned tensors.
        tensors: tensor name in the file -> its sparsity.
        skipped: layers left dense because the pattern does not divide them.
        expert_tokens: matrix of an expert -> calibration tokens that reached it.
        by_magnitude: matrices of experts that were pruned by magnitude, because too few tokens reached them.
        reconstruction: block -> part of it that was tuned -> its error before and after; empty without reconstruction.
        calibration: None for a criterion that needs none.
    """

    out: Path
    pattern: str
    criterion: str | None
    settings: dict[str, Any]
    sparsity: float
    tensors: dict[str, TensorSparsity]
    skipped: list[str]
    expert_tokens: dict[str, int]
    by_magnitude: list[str]
    reconstruction: dict[str, dict[BlockPart, Fit]]
    calibration: CalibrationFacts | None
    seconds: float


def prune(options: PruneOptions) -> PruneReport:
    """Write the model, with zeros in every matrix of its decoder blocks, to `options.out`.

    Raises:
        UsageError: a wrong option, a missing model or text, a full output folder, a pattern that does not divide, or
            another process is at work on the same output.
        SppError: a damaged model, a layer that cannot be pruned, or a full disk. All but the last leave nothing.
    """
    device = pick_device(options.device)
    with distributed.process_group(device):
        try:
            return _prune(options, device)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise SppError(
                f"no space is left on the disk of {options.out} ({error}); finished blocks are kept: make room, and "
                "repeat the command to go on"
            ) from error


def _prune(options: PruneOptions, device: torch.device) -> PruneReport:
    start = time.perf_counter()
    return_freed_memory()  # before calibration text leaves holes in the heap that tensors would go to
    source = Checkpoint.open(resolve_model(options.model, code=options.trust_remote_code))
    check_output(options.out, options.overwrite, inputs=(source.folder,))
    source.require_unquantized("give the model as it was before quantization")
    model = skeleton(source.folder, options, compute_dtype(options.dtype, device))
    require_whole(model, source)
    names, skipped = matrices_to_prune(model, options)
    windows, calibration = _calibrate(options, source.folder, model)
    with (
        _output(options, lambda: _request(options, source, calibration)) as (folder, work),
        FolderJournal(work) as journal,
    ):
        files = None  # the first of several processes writes
        if distributed.rank() == 0:
            files = PrunedFiles(source, folder, work, pruned_parameters(model, names), adopt=options.keep_zeros)
        blocks = PrunedBlocks(model, source, device, files.keep if files else _leave)
        if not journal.results("rest"):
            if files:
                files.copy(set(source.names) - blocks.stored_names())
            journal.finish("rest", None)
        results = prune_blocks(blocks, options, windows, journal, seed=options.seed)
        tensors = {
            name: TensorFacts(**one) for block in journal.results("prune") for name, one in block["kept"].items()
        }
        report = _report(options, results, tensors, skipped, calibration, time.perf_counter() - start)
        if files:
            files.finish()
            write_json(folder / MANIFEST, _manifest(report, options, source))
    _speak(report, tensors, model)
    return report


@contextmanager
def _output(options: PruneOptions, request: Callable[[], Request]) -> Iterator[tuple[Path, Path]]:
    """The folders to write to and to work in. The first of several processes makes them, and the others use them."""
    if distributed.rank() == 0:
        with resumable_folder(options.out, request(), overwrite=options.overwrite) as folders:
            distributed.barrier()
            yield folders
            distributed.barrier()
    else:
        distributed.barrier()
        yield partial_folder(options.out), work_folder(options.out)
        distributed.barrier()


def _request(options: PruneOptions, source: Checkpoint, calibration: CalibrationFacts | None) -> Request:
    """Everything that the bits of the result depend on."""
    inputs = {**model_digests(source.folder), "calibration text": calibration and calibration.sha256}
    versions = {"spp": __version__, "torch": torch.__version__}
    return Request(options.of_the_result(), inputs, {**versions, "processes": distributed.world_size()})


def _leave(_: dict[str, tuple[Part, Tensor]]) -> dict[str, Any]:
    """Discard a finished block that another process writes."""
    return {}


def _calibrate(
    options: PruneOptions, folder: Path, model: PreTrainedModel
) -> tuple[Tensor | None, CalibrationFacts | None]:
    """Calibration windows and their facts; None, and no text is read, if the criterion needs none."""
    if not needs_calibration(options):
        if options.calibration:
            logger.info("no calibration is needed; %s is not read", options.calibration)
        return None, None
    return read_calibration(options, options.calibration or _DEFAULT_TEXT, folder, model)


def _report(
    options: PruneOptions,
    results: list[BlockResult],
    tensors: dict[str, TensorFacts],
    skipped: list[str],
    calibration: CalibrationFacts | None,
    seconds: float,
) -> PruneReport:
    sparsity = sum(one.zeros for one in tensors.values()) / sum(one.entries for one in tensors.values())
    if options.keep_zeros and sparsity < _WORTH_A_NOTE:
        raise UsageError(f"{options.model} has no zeros to keep ({sparsity:.2%}); prune it without --keep-zeros")
    matrices = [matrix for block in results for matrix in block.matrices]
    return PruneReport(
        out=options.out,
        pattern=_found_pattern(tensors, sparsity) if options.keep_zeros else str(options.pattern),
        criterion=None if options.keep_zeros else options.criterion,
        settings=options.model_dump(mode="json", include=set(PruningSettings.model_fields)),
        sparsity=sparsity,
        tensors={name: TensorSparsity(one.sparsity, one.transposed) for name, one in tensors.items()},
        skipped=skipped,
        expert_tokens={one.name: one.tokens for one in matrices if one.expert and one.tokens is not None},
        by_magnitude=[one.name for one in matrices if one.criterion not in (None, options.criterion)],
        reconstruction={block.name: block.fits for block in results if block.fits},
        calibration=calibration,
        seconds=seconds,
    )


def _found_pattern(tensors: dict[str, TensorFacts], sparsity: float) -> str:
    """The N:M pattern that all sparse tensors obey, else the share of zeros over all tensors."""
    found = {one.pattern for one in tensors.values() if one.pattern}
    return found.pop() if len(found) == 1 else str(Unstructured(round(sparsity, 4)))


def _manifest(report: PruneReport, options: PruneOptions, source: Checkpoint) -> dict[str, Any]:
    facts = {name: value for name, value in asdict(report).items() if name not in ("out", "seconds")}
    base = {"base": options.model, "licence": read_licence(source.folder)}
    return {"tool": "spp", "version": __version__, "kind": "pruned", **base, **facts}


def _speak(report: PruneReport, tensors: dict[str, TensorFacts], model: PreTrainedModel) -> None:
    """Log what the user should know."""
    if distributed.rank():
        return
    for name in report.skipped:
        logger.warning("%s stays dense: %s does not divide its input dimension", name, report.pattern)
    if unreached := unreached_weights(model):
        logger.warning(
            "%d weights in the decoder blocks are not prunable matrices and stay dense, e.g. %s",
            len(unreached), unreached[0],
        )  # fmt: skip
    if report.expert_tokens:
        least = min(report.expert_tokens, key=lambda name: report.expert_tokens[name])
        logger.info(
            "calibration tokens that reached an expert: %d at least (%s); all are in %s",
            report.expert_tokens[least], least, MANIFEST,
        )  # fmt: skip
    if report.by_magnitude:
        logger.warning(
            "%d matrices of experts saw too few calibration tokens (--min-expert-tokens) and were pruned by magnitude, "
            "e.g. %s", len(report.by_magnitude), report.by_magnitude[0],
        )  # fmt: skip
    before = sum(one.zeros_before for one in tensors.values()) / sum(one.entries for one in tensors.values())
    if before >= _WORTH_A_NOTE:
        logger.info("%.1f %% of these weights were zero before; all of them still are", 100 * before)
    logger.info("%.2f %% of the weights of %d tensors are zero", 100 * report.sparsity, len(tensors))
