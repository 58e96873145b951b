"""Merge an SPP adapter into its base, tensor by tensor, and prove in the same pass that the zeros stayed.

The result has the files of the base, with new values in the merged tensors. No model is loaded. Memory is three times
the largest tensor: at any time one is read, one merged and one written. If the proof fails, nothing is left behind; a
merge that was killed resumes where it stopped.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp._version import __version__
from spp.adapters.factors import WEIGHTS
from spp.adapters.matching import Changes, match_adapter
from spp.adapters.merge_record import MergeRecord, finished
from spp.adapters.options import MergeOptions, WritingOptions
from spp.adapters.spp_format import Adapter, read_adapter
from spp.adapters.stochastic_rounding import round_stochastically
from spp.checkpoints.atomic_folder import check_output, resumable_folder
from spp.checkpoints.checkpoint import MANIFEST, VERIFICATION, Checkpoint
from spp.checkpoints.fingerprint import (
    WEIGHTS_OF_MODEL,
    file_digest,
    fingerprint,
    json_digest,
    model_digests,
    tensor_digests,
    warn_of_other_base,
)
from spp.checkpoints.hub import resolve_model
from spp.checkpoints.json_files import read_object, write_json
from spp.checkpoints.model_card import read_licence, write_model_card
from spp.checkpoints.prefetch import read_ahead
from spp.checkpoints.request import Request
from spp.checkpoints.rewrite import Rewriting
from spp.checkpoints.verification_record import REPLACED, digests_of, replaced_tensors
from spp.checkpoints.verify import failures
from spp.errors import SppError, raise_problems
from spp.models.weight_names import WeightNames, weights_in_files
from spp.ops.reference import wide_dtype
from spp.ops.zero_proof import TensorProof, compare
from spp.ops.zeros import canonical_zeros, count_non_finite
from spp.runtime.progress import track_bytes

logger = logging.getLogger("spp")

_UNCHANGED_WORTH_A_WARNING = 0.5
_TIED = "tie_word_embeddings"
_AT_ONCE = 2**28  # bytes written before they are flushed to disk, which happens while the next ones are written


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """The result of `merge`.

    Attributes:
        verified: always True; a merge that fails its proof raises and writes nothing.
        zeros: zeros of the base in merged and converted tensors; every one of them is +0.0 in the result.
        tensors: proof of each merged tensor.
        converted: proof of each tensor that only got another dtype; all others are copied byte for byte.
        replaced: names of tensors that were trained whole, without SPP: dense weights, of which nothing is proved.
        underflowed: survivors (non-zeros of the base) that rounding turned into zeros.
        unchanged_share: share of the survivors in merged tensors whose change was lost in rounding.
    """

    verified: bool
    out: Path
    zeros: int
    tensors: dict[str, TensorProof]
    converted: dict[str, TensorProof]
    replaced: list[str]
    underflowed: int
    unchanged_share: float
    seconds: float


def merge(options: MergeOptions) -> MergeReport:
    """Write the base with the adapter merged into it to `options.out`; the result loads without spp.

    Raises:
        UsageError: a folder is missing, the output is not empty, or the adapter is not an SPP adapter.
        SppError: the adapter belongs to another model, a file is damaged, or the proof failed.
    """
    start = time.perf_counter()
    base = Checkpoint.open(resolve_model(options.model))
    check_output(options.out, options.overwrite, inputs=(base.folder, options.adapter))
    base.require_unquantized("merge into the sparse model before quantization")
    _ = base.manifest  # a damaged one is not to be found when the new model's is made, at the end
    adapter = read_adapter(options.adapter)
    changes = match_adapter(base, adapter, options.adapter)
    digests = tensor_digests(base)
    request = _request(base, digests, adapter, options)
    warn_of_other_base(options.adapter, options.model, lambda: str(request.inputs[WEIGHTS_OF_MODEL]))
    origin = {"adapter": str(options.adapter), "training": _training(options.adapter)}
    with resumable_folder(options.out, request, overwrite=options.overwrite) as (folder, work):
        report = write_model(base, digests, changes, options, origin, folder=folder, work=work)
    return replace(report, seconds=time.perf_counter() - start)


def write_model(
    base: Checkpoint,
    digests: dict[str, str],
    changes: Changes,
    options: WritingOptions,
    origin: Mapping[str, Any],
    *,
    folder: Path,
    work: Path,
) -> MergeReport:
    """Write the base with new values in some tensors, the proof of its zeros, the manifest and the model card.

    Args:
        base: the sparse model.
        digests: of its tensors.
        changes: which tensors become what.
        options: names, dtype, rounding, seed, and what is accepted.
        origin: where the new values come from, for the manifest: its entry `training`, and others.
        folder: the new folder.
        work: folder for the record from which a killed run goes on.

    Raises:
        SppError: a file is damaged, or the proof failed.
    """
    start = time.perf_counter()
    record = _write(base, digests, changes, options, folder, work)
    raise_problems([f"{problem}; nothing was written" for problem in _problems(record, options)], SppError)
    _require_untied(folder, changes)
    report = _report(options.out, record, changes, time.perf_counter() - start)
    proved = _verification(record, options, report) | {key: origin[key] for key in origin if key != "training"}
    write_json(folder / VERIFICATION, proved | digests_of(digests, record.digests))
    write_json(folder / MANIFEST, _manifest(base, options, origin, report))
    write_model_card(folder)
    _warn(report)
    return report


def _problems(record: MergeRecord, options: WritingOptions) -> list[str]:
    """What keeps a merge from being proved, in words."""
    proofs = record.proofs
    problems = [problem for name, proof in proofs.items() for problem in failures(name, proof)]
    if not options.allow_nonfinite:
        problems += [
            f"{name}: {one['non_finite']} entries of the model are NaN or infinite; pass --allow-nonfinite if that is "
            "meant to be"
            for name, one in record.done.items()
            if one["non_finite"]
        ]
    if not options.allow_dense and not any(proof.zeros for proof in proofs.values()):
        problems.append(
            f"{options.model} is dense: it has no zero that could be kept, so that there is nothing to prove; give the "
            "pruned model, or pass --allow-dense"
        )
    return problems


def _request(base: Checkpoint, digests: dict[str, str], adapter: Adapter, options: MergeOptions) -> Request:
    """All that the bits of the result depend on."""
    scales = json_digest({name: one.scale for name, one in adapter.factors.items()})
    whole = {name: one.rows if one.rows is None else one.rows.tolist() for name, one in adapter.whole.items()}
    inputs = {
        **model_digests(base.folder, fingerprint(base, digests)),
        "adapter": file_digest(options.adapter / WEIGHTS),
        "scales of the adapter": scales,
        **({"weights that the adapter replaces": json_digest(whole)} if whole else {}),
    }
    return Request(options.of_the_result(), inputs, {"spp": __version__})


def _write(
    base: Checkpoint, digests: dict[str, str], changes: Changes, options: WritingOptions, folder: Path, work: Path
) -> MergeRecord:
    """Write every tensor that no earlier run has written; return the record of all.

    While one tensor is merged, the next one is read, the previous one is written, and earlier ones are flushed to disk.
    """
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    files = Rewriting(base, folder, dtype, added=changes.added, settings=_untying(base) if changes.unties else {})
    record = MergeRecord(work, files, digests)
    sizes = {name: layout.nbytes for name, layout in files.layouts.items()}
    left = [name for name in files.layouts if name not in record.done]
    total, unsaved = sum(sizes.values()), 0
    with (
        ThreadPoolExecutor(1) as writer,
        record,
        track_bytes("merging", total, done=total - sum(sizes[name] for name in left)) as advance,
    ):
        writing = finished()
        for name, before in read_ahead(lambda name: base.read(changes.source(name)), left):
            writing.result()
            non_finite = count_non_finite(before)
            if changes.keep(base, name) and files.layouts[name] == base.layouts[name]:
                writing = writer.submit(record.copy, name, non_finite)
            else:
                after = _new(name, before, changes, dtype or before.dtype, options)
                proof = None if changes.is_dense(name) else compare(before, after)
                writing = writer.submit(record.write, name, after, proof, non_finite)
                del after  # or it would be in memory beside the next ones
            del before
            advance(sizes[name])
            unsaved += sizes[name]
            if unsaved >= _AT_ONCE or name == left[-1]:
                writing.result()
                record.save()
                unsaved = 0
    files.finish()
    return record


def _new(name: str, weight: Tensor, changes: Changes, dtype: torch.dtype, options: WritingOptions) -> Tensor:
    """A new weight, rounded once, zeros as +0.0; or a dense one; or the old one in another dtype."""
    if name in changes.replaced:
        return changes.replaced[name].applied(weight).to(dtype)
    if name not in changes.updates:
        return canonical_zeros(weight.to(dtype))
    if options.rounding == "nearest":
        return changes.updates[name].merge(weight, dtype)
    return _rounded(changes.updates[name].merge(weight, wide_dtype(weight)), dtype, options.seed, name)


def _rounded(weight: Tensor, dtype: torch.dtype, seed: int, name: str) -> Tensor:
    """Round stochastically; the draws depend on the seed and the name alone, so a resumed merge has the same bits."""
    if weight.dtype == dtype:
        return weight
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return round_stochastically(weight, dtype, torch.Generator().manual_seed(int.from_bytes(digest[:7])))


def _report(out: Path, record: MergeRecord, changes: Changes, seconds: float) -> MergeReport:
    proofs = record.proofs
    merged = {name: proof for name, proof in proofs.items() if name in changes.updates}
    survivors = sum(proof.survivors for proof in merged.values())
    return MergeReport(
        verified=True,
        out=out,
        zeros=sum(proof.zeros for proof in proofs.values()),
        tensors=merged,
        converted={name: proof for name, proof in proofs.items() if name not in changes.updates},
        replaced=sorted(changes.replaced.keys() | changes.added.keys()),
        underflowed=sum(proof.underflowed for proof in proofs.values()),
        unchanged_share=sum(proof.unchanged for proof in merged.values()) / max(survivors, 1),
        seconds=seconds,
    )


def _untying(base: Checkpoint) -> dict[str, Any]:
    """The settings in config.json that untie a model's embeddings, also those of its language model."""
    inner = {name: part for name, part in base.config.items() if isinstance(part, dict) and _TIED in part}
    return {_TIED: False, **{name: {**part, _TIED: False} for name, part in inner.items()}}


def _require_untied(folder: Path, changes: Changes) -> None:
    """Check that the new files give weights that were tied values of their own.

    Raises:
        SppError: the model's class ties them whatever its configuration says.
    """
    names = weights_in_files(Checkpoint.open(folder)) if changes.unties else WeightNames({})
    if tied := sorted(names.tied):
        raise SppError(
            f"the adapter trained {tied[0]} and {names.tied[tied[0]]} apart, and this model's class ties them whatever "
            "config.json says; train it again without the one of them in modules_to_save, or merge it in memory with "
            "PeftModel.merge_and_unload; nothing was written"
        )


def _training(adapter: Path) -> dict[str, Any]:
    """What an adapter's spp.json says of its training."""
    manifest = read_object(adapter / MANIFEST) if (adapter / MANIFEST).is_file() else {}
    return {key: manifest[key] for key in ("data", "settings", "steps", "tokens") if key in manifest}


def _manifest(
    base: Checkpoint, options: WritingOptions, origin: Mapping[str, Any], report: MergeReport
) -> dict[str, Any]:
    inherited = {key: base.manifest[key] for key in ("pattern", "criterion", "sparsity") if key in base.manifest}
    return {
        "tool": "spp",
        "version": __version__,
        "kind": "merged",
        "name": options.out.name,
        "licence": read_licence(base.folder),
        **inherited,
        "base": options.model,
        **origin,
        "verification": _totals(report),
        REPLACED: sorted({*report.replaced, *replaced_tensors(base.manifest)}),
    }


def _verification(record: MergeRecord, options: WritingOptions, report: MergeReport) -> dict[str, Any]:
    return {
        "tool": "spp",
        "version": __version__,
        "base": options.model,
        **options.model_dump(include={"dtype", "rounding", "seed"}),
        **_totals(report),
        "copied": len(record.done) - len(report.tensors) - len(report.converted) - len(report.replaced),
        "tensors": {name: asdict(proof) for name, proof in report.tensors.items()},
        "converted": {name: asdict(proof) for name, proof in report.converted.items()},
        REPLACED: report.replaced,
    }


def _totals(report: MergeReport) -> dict[str, Any]:
    return {
        "verified": report.verified,
        "zeros": report.zeros,
        "underflowed": report.underflowed,
        "unchanged_share": report.unchanged_share,
    }


def _warn(report: MergeReport) -> None:
    if report.underflowed:
        logger.warning("%d survivors were so small that rounding made them zero", report.underflowed)
    if report.unchanged_share > _UNCHANGED_WORTH_A_WARNING:
        logger.warning(
            "%.0f %% of the survivors are unchanged: their updates are smaller than the result's dtype can show; "
            "--rounding stochastic keeps them in the mean (and spp merge --dtype float32 every one)",
            100 * report.unchanged_share,
        )
