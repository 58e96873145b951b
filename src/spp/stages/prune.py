"""Prune a dense model: choose and mend weights on calibration text, and write the model's own files with zeros in them.

The model computes in the dtype that the options ask for; the files keep theirs. A weight that pruning leaves alone is
written with the bits that it was read with.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spp import __version__
from spp.checkpoint import MANIFEST, Checkpoint, resolve_model
from spp.data.calibration import Calibration, calibration_windows
from spp.errors import SppError
from spp.folders import check_output, new_folder, write_json
from spp.loading import context_window, load_model, load_tokenizer
from spp.models import prunable_linears, sparsity, unreached_weights
from spp.options import PruneOptions
from spp.packing import unpack_
from spp.patterns import parse_pattern
from spp.pruning.criteria import CRITERIA
from spp.pruning.engine import prune_model
from spp.rewriting import rewrite, tensor_name

logger = logging.getLogger("spp")

_DEFAULT_TEXT = "python-stdlib"
_WORTH_A_NOTE = 0.01


@dataclass(frozen=True)
class TensorSparsity:
    """A pruned tensor as it lies in the file.

    Attributes:
        sparsity: share of zeros.
        transposed: whether the file holds it as (I, O) instead of (O, I).
    """

    sparsity: float
    transposed: bool


@dataclass(frozen=True)
class CalibrationFacts:
    """What the statistics were taken from; `kind` says how the windows were cut, `sha256` is that of the token ids."""

    source: str
    samples: int
    window: int
    seed: int
    sha256: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """The result of `prune`.

    Attributes:
        sparsity: share of zeros over all pruned tensors.
        tensors: tensor name in the file -> what it is like now.
        skipped: layers left dense because the pattern does not divide them.
        calibration: None for a criterion that needs none.
    """

    out: Path
    pattern: str
    criterion: str
    sparsity: float
    tensors: dict[str, TensorSparsity]
    skipped: list[str]
    calibration: CalibrationFacts | None
    seconds: float


def prune(options: PruneOptions) -> PruneReport:
    """Write `options.out`: the model with zeros in every linear layer of its decoder blocks.

    Raises:
        UsageError: a wrong option, a missing model or text, a full output folder, a pattern that does not divide.
        SppError: a damaged model, or a layer that cannot be pruned.
    """
    start = time.perf_counter()
    source = Checkpoint.open(resolve_model(options.model))
    check_output(options.out, options.overwrite, inputs=(source.folder,))
    source.require_unquantised("give the model as it was before quantisation")
    pattern = parse_pattern(options.pattern)

    model = unpack_(load_model(options.model, options))  # an archive's layers come packed
    linears = prunable_linears(model)
    names = _names_in_file(source, linears)
    _note_what_is_there(model, linears)
    windows, facts = _calibrate(options, model)
    skipped = prune_model(model, pattern, options.criterion, windows, skip_indivisible=options.skip_indivisible)

    changes = {
        names[name]: partial(_in_file_dtype, after=module.get_parameter("weight").detach(), name=names[name])
        for name, module in linears.items()
        if name not in set(skipped)
    }
    with new_folder(options.out, overwrite=options.overwrite) as folder:
        rewrite(source, folder, changes, "writing")
        share, tensors = _measure(Checkpoint.open(folder), list(changes))
        report = PruneReport(
            out=options.out,
            pattern=str(pattern),
            criterion=options.criterion,
            sparsity=share,
            tensors=tensors,
            skipped=skipped,
            calibration=facts,
            seconds=time.perf_counter() - start,
        )
        write_json(folder / MANIFEST, _manifest(report, options))
    for name in skipped:
        logger.warning("%s stays dense: %s does not divide its input dimension", name, report.pattern)
    logger.info("%.2f %% of the weights of %d layers are zero", 100 * report.sparsity, len(tensors))
    return report


def _names_in_file(source: Checkpoint, linears: dict[str, nn.Module]) -> dict[str, str]:
    """Module name -> name of its weight in the checkpoint; an error, before any work, where one has none."""
    names = {}
    for module_name, module in linears.items():
        name = tensor_name(source, module_name)
        shape = tuple(module.get_parameter("weight").shape)
        if name is None or source.shape(name) != shape:
            raise SppError(
                f"{source.folder}: no tensor for {module_name}.weight of shape {shape}; the files use a layout that "
                "transformers converts on loading: load the model and save_pretrained it to a new folder first"
            )
        names[module_name] = name
    return names


def _note_what_is_there(model: PreTrainedModel, linears: dict[str, nn.Module]) -> None:
    already = sparsity(linears.values())
    if already >= _WORTH_A_NOTE:
        logger.info("the model is %.1f %% sparse already; its zeros stay, and count towards the pattern", 100 * already)
    if unreached := unreached_weights(model):
        logger.warning(
            "%d weights in the decoder blocks are no linear layers and stay dense, e.g. %s",
            len(unreached),
            unreached[0],
        )


def _calibrate(options: PruneOptions, model: PreTrainedModel) -> tuple[Tensor | None, CalibrationFacts | None]:
    """Token windows for the criterion and where they came from; nothing is read where it needs none."""
    if CRITERIA[options.criterion].statistic is None:
        if options.calibration:
            logger.info("%s needs no calibration; %s is not read", options.criterion, options.calibration)
        return None, None
    window = context_window(model.config, options.window)
    tokenizer = load_tokenizer(options.model, options)
    calibration: Calibration = calibration_windows(
        tokenizer, options.calibration or _DEFAULT_TEXT, samples=options.samples, window=window, seed=options.seed
    )
    samples, window = calibration.windows.shape
    facts = CalibrationFacts(calibration.source, samples, window, options.seed, calibration.sha256, calibration.kind)
    logger.info(
        "calibrating on %d windows of %d tokens from %s (%s, seed %d)",
        samples, window, facts.source, facts.kind, facts.seed,
    )  # fmt: skip
    return calibration.windows, facts


def _in_file_dtype(before: Tensor, *, after: Tensor, name: str) -> Tensor:
    """The pruned weight in the dtype of the file; entries that pruning did not touch keep the file's bits.

    So a survivor is exact even where the model computed in a narrower dtype than its file has.
    """
    after = after.to(before.device)
    untouched = (after != 0) & (after == before.to(after.dtype))
    written = torch.where(untouched, before, after.to(before.dtype))
    if not torch.isfinite(written).all():
        dtype = str(before.dtype).removeprefix("torch.")
        raise SppError(f"{name}: an updated weight is too large for the checkpoint's {dtype}; use the criterion wanda")
    return written


def _measure(written: Checkpoint, names: list[str]) -> tuple[float, dict[str, TensorSparsity]]:
    """Share of zeros in the files, over all of these tensors and for each."""
    tensors, zeros, entries = {}, 0, 0
    for name in names:
        tensor = written.tensor(name)
        count = int((tensor == 0).sum())
        tensors[name] = TensorSparsity(count / tensor.numel(), written.transposed(name))
        zeros, entries = zeros + count, entries + tensor.numel()
    return zeros / entries, tensors


def _manifest(report: PruneReport, options: PruneOptions) -> dict[str, Any]:
    facts = {name: value for name, value in asdict(report).items() if name not in ("out", "seconds")}
    return {"tool": "spp", "version": __version__, "kind": "pruned", "base": options.model, **facts}
