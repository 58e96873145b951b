"""Merge an SPP adapter into its base, tensor by tensor, and prove in the same pass that the zeros stayed.

The result has the files of the base, with new values in the merged tensors. No model is loaded. Memory is three times
the largest tensor: at any time one is read, one merged and one written. If the proof fails, nothing is left behind; a
merge that was killed resumes where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from spp._version import __version__
from spp.adapters.factors import WEIGHTS, Factors
from spp.adapters.merge_record import MergeRecord, finished
from spp.adapters.options import MergeOptions, WritingOptions
from spp.adapters.spp_format import read_adapter
from spp.adapters.stochastic_rounding import round_stochastically
from spp.checkpoints.atomic_folder import check_output, resumable_folder
from spp.checkpoints.checkpoint import MANIFEST, VERIFICATION, Checkpoint
from spp.checkpoints.fingerprint import (
    WEIGHTS_OF_MODEL,
    file_digest,
    fingerprint,
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
from spp.checkpoints.verification_record import digests_of
from spp.checkpoints.verify import failures
from spp.errors import SppError, raise_problems
from spp.models.weight_map import Part
from spp.models.weight_names import weights_in_files
from spp.ops.dtypes import FLOATS
from spp.ops.reference import mixture, row_groups, wide_dtype
from spp.ops.zero_proof import TensorProof, compare
from spp.ops.zeros import canonical_zeros, count_non_finite
from spp.runtime.progress import track_bytes

logger = logging.getLogger("spp")

_UNCHANGED_WORTH_A_WARNING = 0.5
_MERGED_DTYPES = [one.safetensors for one in FLOATS.values()]
_AT_ONCE = 2**28  # bytes written before they are flushed to disk, which happens while the next ones are written


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """The result of `merge`.

    Attributes:
        verified: always True; a merge that fails its proof raises and writes nothing.
        zeros: zeros of the base in merged and converted tensors; every one of them is +0.0 in the result.
        tensors: proof of each merged tensor.
        converted: proof of each tensor that only got another dtype; all others are copied byte for byte.
        underflowed: survivors (non-zeros of the base) that rounding turned into zeros.
        unchanged_share: share of the survivors in merged tensors whose change was lost in rounding.
    """

    verified: bool
    out: Path
    zeros: int
    tensors: dict[str, TensorProof]
    converted: dict[str, TensorProof]
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
    factors = match_adapter(base, read_adapter(options.adapter), options.adapter)
    digests = tensor_digests(base)
    request = _request(base, digests, factors, options)
    warn_of_other_base(options.adapter, options.model, lambda: str(request.inputs[WEIGHTS_OF_MODEL]))
    updates = {name: Update(one, base.transposed(name)) for name, one in factors.items()}
    origin = {"adapter": str(options.adapter), "training": _training(options.adapter)}
    with resumable_folder(options.out, request, overwrite=options.overwrite) as (folder, work):
        report = write_model(base, digests, updates, options, origin, folder=folder, work=work)
    return replace(report, seconds=time.perf_counter() - start)


class NewWeight(Protocol):
    """What a weight becomes."""

    def merge(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The new weight, laid out as the old one is, rounded once to `dtype`; +0.0 where the old one is zero."""
        ...


@dataclass(frozen=True)
class Update:
    """Factors that a tensor is merged with, and whether the files hold it as (I, O)."""

    factors: Factors
    transposed: bool

    def merge(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """W' = W + s * W * (A[g] B) (paper, eq. 5), laid out as W is."""
        if not self.transposed:
            return self.factors.merge(weight, dtype)
        return self.factors.merge(weight.T, dtype).T.contiguous()


def write_model(
    base: Checkpoint,
    digests: dict[str, str],
    updates: Mapping[str, NewWeight],
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
        updates: tensor -> what it becomes.
        options: names, dtype, rounding, seed, and what is accepted.
        origin: where the new values come from, for the manifest: its entry `training`, and others.
        folder: the new folder.
        work: folder for the record from which a killed run goes on.

    Raises:
        SppError: a file is damaged, or the proof failed.
    """
    start = time.perf_counter()
    record = _write(base, updates, options, folder, work)
    raise_problems([f"{problem}; nothing was written" for problem in _problems(record, options)], SppError)
    report = _report(options.out, record.proofs, updates, time.perf_counter() - start)
    proved = _verification(base, options, report) | {key: origin[key] for key in origin if key != "training"}
    write_json(folder / VERIFICATION, proved | digests_of(digests, record.digests(digests)))
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


def _request(
    base: Checkpoint, digests: dict[str, str], factors: Mapping[str, Factors], options: MergeOptions
) -> Request:
    """All that the bits of the result depend on."""
    adapter = {"adapter": file_digest(options.adapter / WEIGHTS), "scales of the adapter": _digest_of_scales(factors)}
    inputs = {**model_digests(base.folder, fingerprint(base, digests)), **adapter}
    return Request(options.of_the_result(), inputs, {"spp": __version__})


def _digest_of_scales(factors: Mapping[str, Factors]) -> str:
    return hashlib.sha256(json.dumps({name: one.scale for name, one in factors.items()}).encode()).hexdigest()


def _write(
    base: Checkpoint, updates: Mapping[str, NewWeight], options: WritingOptions, folder: Path, work: Path
) -> MergeRecord:
    """Write every tensor that no earlier run has written; return the record of all.

    While one tensor is merged, the next one is read, the previous one is written, and earlier ones are flushed to disk.
    """
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    files = Rewriting(base, folder, dtype)
    record = MergeRecord(work, files)
    copied = {name for name in base.names if name not in updates and files.layouts[name] == base.layouts[name]}
    sizes = {name: layout.nbytes for name, layout in base.layouts.items()}
    left = [name for name in base.names if name not in record.done]
    total, unsaved = sum(sizes.values()), 0
    with (
        ThreadPoolExecutor(1) as writer,
        record,
        track_bytes("merging", total, done=total - sum(sizes[name] for name in left)) as advance,
    ):
        writing = finished()
        for name, before in read_ahead(base.read, left):
            writing.result()
            non_finite = count_non_finite(before)
            if name in copied:
                writing = writer.submit(record.copy, name, non_finite)
            else:
                after = _new(name, before, updates.get(name), dtype or before.dtype, options)
                writing = writer.submit(record.write, name, after, compare(before, after), non_finite)
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


def _new(name: str, weight: Tensor, update: NewWeight | None, dtype: torch.dtype, options: WritingOptions) -> Tensor:
    """The new weight, rounded once; or the old one in another dtype. Zeros are +0.0."""
    if update is None:
        return canonical_zeros(weight.to(dtype))
    if options.rounding == "nearest":
        return update.merge(weight, dtype)
    return _rounded(update.merge(weight, wide_dtype(weight)), dtype, options.seed, name)


def _rounded(weight: Tensor, dtype: torch.dtype, seed: int, name: str) -> Tensor:
    """Round stochastically; the draws depend on the seed and the name alone, so a resumed merge has the same bits."""
    if weight.dtype == dtype:
        return weight
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return round_stochastically(weight, dtype, torch.Generator().manual_seed(int.from_bytes(digest[:7])))


def match_adapter(base: Checkpoint, adapter: dict[str, Factors], folder: Path) -> dict[str, Factors]:
    """The factors by the tensor that they change: its name in the checkpoint -> factors.

    Raises:
        SppError: some do not fit, so that the adapter belongs to another model.
    """
    matched: dict[str, Factors] = {}
    problems = []
    weights = weights_in_files(base)
    for module, factors in adapter.items():
        parts = weights.get(module, {})
        problem = None if parts else f"it has no weight for {module}"
        for name, part in parts.items():
            found = _of_part(factors, part)
            problem = problem or _misfit(base, name, found)
            if found is not None and matched.setdefault(name, found) is not found:
                problem = problem or f"it has {name} for {module}, and for another module as well"
        problems += [problem] if problem else []
    if problems:
        raise SppError(
            f"adapter {folder} was trained for another model than {base.folder}: {len(problems)} of {len(adapter)} "
            f"weights do not fit; first of them: {problems[0]}"
        )
    return matched


def _misfit(base: Checkpoint, name: str, factors: Factors | None) -> str | None:
    """Why factors cannot be merged into a tensor, or None."""
    if factors is None:
        return f"its {name} is laid out in another way than the model's weight"
    if base.layouts[name].dtype not in _MERGED_DTYPES:
        return f"its {name} is {base.layouts[name].dtype}, and only {', '.join(_MERGED_DTYPES)} can be merged into"
    if base.shape(name) != (wanted := factors.stored_shape(base.transposed(name))):
        return f"its {name} is {base.shape(name)}, the adapter's {wanted}"
    return None


def _of_part(factors: Factors, part: Part) -> Factors | None:
    """The factors of a whole weight, or of rows of it that the files hold by themselves; None for other parts."""
    if not part.steps:
        return factors
    shape = factors.stored_shape(transposed=False)
    if (rows := part.rows(shape)) is None:
        return None
    count, directions = factors.groups, factors.directions
    groups, B = row_groups(shape[0], count)[rows], factors.B[rows]
    A = factors.A.unflatten(0, (count, directions))
    finer = row_groups(len(rows), count)
    outer = torch.zeros(count, dtype=groups.dtype).scatter_(0, finer, groups)
    if count * directions <= len(rows) and outer[finer].equal(groups):
        return Factors(A=A[outer].flatten(0, 1), B=B, scale=factors.scale)
    # Groups do not end where the part does: what each row is multiplied with, with the bits that merging gives it.
    wide = wide_dtype(A, B)
    multiplier = mixture([A[groups, k].to(wide) for k in range(directions)], factors.scale * B.to(wide))
    return Factors(A=multiplier, B=torch.ones(len(rows), 1), scale=1.0)


def _report(out: Path, proofs: dict[str, TensorProof], updates: Container[str], seconds: float) -> MergeReport:
    merged = {name: proof for name, proof in proofs.items() if name in updates}
    survivors = sum(proof.survivors for proof in merged.values())
    return MergeReport(
        verified=True,
        out=out,
        zeros=sum(proof.zeros for proof in proofs.values()),
        tensors=merged,
        converted={name: proof for name, proof in proofs.items() if name not in updates},
        underflowed=sum(proof.underflowed for proof in proofs.values()),
        unchanged_share=sum(proof.unchanged for proof in merged.values()) / max(survivors, 1),
        seconds=seconds,
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
    }


def _verification(base: Checkpoint, options: WritingOptions, report: MergeReport) -> dict[str, Any]:
    return {
        "tool": "spp",
        "version": __version__,
        "base": options.model,
        **options.model_dump(include={"dtype", "rounding", "seed"}),
        **_totals(report),
        "copied": len(base.names) - len(report.tensors) - len(report.converted),
        "tensors": {name: asdict(proof) for name, proof in report.tensors.items()},
        "converted": {name: asdict(proof) for name, proof in report.converted.items()},
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
