"""Fold an SPP adapter into its base, tensor by tensor, and prove in the same pass that the zeros stayed.

The result is what engines expect: the base's own files with other numbers in them. No model is built; memory is three
times the largest tensor: one that is read, one that is merged, one that is written. A failed proof leaves nothing
behind; a run that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Container, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spp import __version__
from spp.ahead import read_ahead
from spp.checkpoint import MANIFEST, VERIFICATION, Checkpoint, resolve_model
from spp.errors import SppError, UsageError, raise_problems
from spp.fingerprint import base_fingerprint
from spp.folders import WORK, check_output, read_json, resumable_folder, write_json
from spp.model_card import read_licence, write_model_card
from spp.ops import merged_weight
from spp.ops.reference import wide_dtype
from spp.options import MergeOptions
from spp.progress import track_bytes
from spp.proof import TensorProof, compare
from spp.rewriting import Rewriting, tensor_name
from spp.rounding import round_stochastically
from spp.stages.verify import failures
from spp.values import canonical_zeros

logger = logging.getLogger("spp")

_KEY_PREFIX = "base_model.model."
_UNCHANGED_WORTH_A_WARNING = 0.5
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
RECORD = "merged.json"
_AT_ONCE = 2**30  # bytes that are written before a record says so


@dataclass(frozen=True)
class Factors:
    """The trained factors of one weight: `A` (R K, I), `B` (O, K) and the scale s."""

    A: Tensor
    B: Tensor
    scale: float

    def stored_shape(self, transposed: bool) -> tuple[int, int]:
        """The shape of the weight that they fit, (O, I), or (I, O) where it is stored transposed."""
        out_features, in_features = self.B.shape[0], self.A.shape[1]
        return (in_features, out_features) if transposed else (out_features, in_features)


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """The result of `merge`.

    Attributes:
        verified: always True; a merge that fails its proof raises and writes nothing.
        zeros: zeros of the base in what was merged or converted, every one of them +0.0 in the result.
        tensors: proof of each merged tensor.
        converted: proof of each other tensor that got another dtype; the rest is byte for byte the base's.
        underflowed: survivors that rounding turned into zeros.
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
    """Write `options.out`: the base with the adapter folded in, loadable without spp.

    Raises:
        UsageError: a folder is missing, the output is not empty, or the adapter is not an SPP adapter.
        SppError: the adapter belongs to another model, a file is damaged, or the proof failed.
    """
    start = time.perf_counter()
    base = Checkpoint.open(resolve_model(options.model))
    check_output(options.out, options.overwrite, inputs=(base.folder, options.adapter))
    base.require_unquantised("merge into the sparse model before quantisation")
    factors = _match(base, read_adapter(options.adapter), options.adapter)

    with resumable_folder(options.out, _request(base, factors, options), overwrite=options.overwrite) as folder:
        proofs = _write(base, factors, options, folder)
        problems = [problem for name, proof in proofs.items() for problem in failures(name, proof)]
        raise_problems([f"{problem}; nothing was written" for problem in problems], SppError)
        report = _report(options.out, proofs, factors, time.perf_counter() - start)
        write_json(folder / VERIFICATION, _verification(base, options, report))
        write_json(folder / MANIFEST, _manifest(base, options, report))
        write_model_card(folder)
    _warn(report)
    return report


def _request(base: Checkpoint, factors: Mapping[str, Factors], options: MergeOptions) -> dict[str, Any]:
    """All that the bits of the result depend on, as JSON values."""
    return {
        "stage": "merge",
        "version": __version__,
        "base": base_fingerprint(base.folder),
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in base.shards},
        "adapter": hashlib.sha256((options.adapter / _ADAPTER_WEIGHTS).read_bytes()).hexdigest(),
        "scales": {name: one.scale for name, one in factors.items()},
        **options.model_dump(include={"dtype", "rounding", "seed"}),
    }


def _write(
    base: Checkpoint, factors: Mapping[str, Factors], options: MergeOptions, folder: Path
) -> dict[str, TensorProof]:
    """Write every tensor that no earlier run has; the proofs of those that are not copied.

    While one tensor is worked on, the next one is read and the one before it is written.
    """
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    files, record = Rewriting(base, folder, dtype), folder / WORK / RECORD
    rewritten = {name for name in base.names if name in factors or files.layouts[name] != base.layouts[name]}
    finished: dict[str, Any] = read_json(record) if record.is_file() else {}
    sizes = {name: layout.nbytes for name, layout in base.layouts.items()}
    left = [name for name in base.names if name not in finished]
    total, unsaved = sum(sizes.values()), 0
    with (
        ThreadPoolExecutor(1) as writer,
        track_bytes("merging", total, done=total - sum(sizes[name] for name in left)) as advance,
    ):
        writing: Future[None] = Future()
        writing.set_result(None)
        for name, before in read_ahead(lambda name: base.tensor(name) if name in rewritten else None, left):
            writing.result()
            if before is None:
                finished[name] = None
                writing = writer.submit(files.copy, name)
            else:
                after = _new(name, before, factors.get(name), base.transposed(name), dtype or before.dtype, options)
                finished[name] = asdict(compare(before, after))
                writing = writer.submit(files.write, name, after)
                del before, after  # or they would be in memory beside the next ones
            advance(sizes[name])
            unsaved += sizes[name]
            if unsaved >= _AT_ONCE or name == left[-1]:
                writing.result()
                files.sync()
                write_json(record, finished)
                unsaved = 0
    files.finish()
    return {name: TensorProof(**finished[name]) for name in base.names if finished[name] is not None}


def _new(
    name: str, weight: Tensor, factors: Factors | None, transposed: bool, dtype: torch.dtype, options: MergeOptions
) -> Tensor:
    """W' = W + s * W * (A[g] B) (paper, eq. 5), rounded once; or W itself in another dtype. Zeros are +0.0."""
    if factors is None:
        return canonical_zeros(weight.to(dtype))
    A, B, scale = factors.A, factors.B, factors.scale
    weight = weight.T if transposed else weight
    if options.rounding == "stochastic":
        merged = _rounded(merged_weight(weight, A, B, scale, wide_dtype(weight, A, B)), dtype, options.seed, name)
    else:
        merged = merged_weight(weight, A, B, scale, dtype)
    return merged.T.contiguous() if transposed else merged


def _rounded(weight: Tensor, dtype: torch.dtype, seed: int, name: str) -> Tensor:
    """Round at random; what is drawn depends on the seed and the name, and not on what was drawn before a kill."""
    if weight.dtype == dtype:
        return weight
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return round_stochastically(weight, dtype, torch.Generator().manual_seed(int.from_bytes(digest[:7])))


def read_adapter(folder: Path) -> dict[str, Factors]:
    """Read a saved SPP adapter: module name -> factors.

    Raises:
        UsageError: no adapter is there, or it is of another method.
        SppError: the file is damaged or holds more than SPP factors.
    """
    if not folder.is_dir():
        raise UsageError(f"adapter {folder}: no such folder")
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "SPP":
        raise UsageError(f"adapter {folder} is of type {config.get('peft_type')!r}, and only SPP adapters merge here")
    tensors = _adapter_tensors(folder)
    modules = {name.removesuffix(".spp_A.weight") for name in tensors if name.endswith(".spp_A.weight")}
    wanted = {f"{module}.spp_{factor}.weight" for module in modules for factor in "AB"}
    if not modules or wanted != set(tensors):
        odd = sorted(wanted.symmetric_difference(tensors)) or ["no factors at all"]
        raise SppError(
            f"adapter {folder} does not consist of pairs of SPP factors ({odd[0]}); if it trained other modules as "
            "well, merge it with PeftModel.merge_and_unload"
        )
    return {
        module.removeprefix(_KEY_PREFIX): Factors(
            A=tensors[f"{module}.spp_A.weight"],
            B=tensors[f"{module}.spp_B.weight"],
            scale=config["scale"],
        )
        for module in sorted(modules)
    }


def _adapter_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / _ADAPTER_WEIGHTS
    if not path.is_file():
        raise UsageError(f"adapter {folder}: {_ADAPTER_WEIGHTS} is missing")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise SppError(f"{path}: not a whole safetensors file ({error}); it is truncated or damaged") from error


def _match(base: Checkpoint, adapter: dict[str, Factors], folder: Path) -> dict[str, Factors]:
    """Tensor name in the checkpoint -> factors; every one must fit."""
    matched: dict[str, Factors] = {}
    problems = []
    for module, factors in adapter.items():
        name = tensor_name(base, module)
        if name is None:
            problems.append(f"it has no weight for {module}")
        elif base.shape(name) != (wanted := factors.stored_shape(base.transposed(name))):
            problems.append(f"its {name} is {base.shape(name)}, the adapter's {wanted}")
        else:
            matched[name] = factors
    if problems:
        raise SppError(
            f"adapter {folder} was trained for another model than {base.folder}: {len(problems)} of {len(adapter)} "
            f"weights do not fit; first of them: {problems[0]}"
        )
    return matched


def _report(out: Path, proofs: dict[str, TensorProof], factors: Container[str], seconds: float) -> MergeReport:
    merged = {name: proof for name, proof in proofs.items() if name in factors}
    survivors = sum(proof.survivors for proof in merged.values())
    return MergeReport(
        verified=True,
        out=out,
        zeros=sum(proof.zeros for proof in proofs.values()),
        tensors=merged,
        converted={name: proof for name, proof in proofs.items() if name not in factors},
        underflowed=sum(proof.underflowed for proof in proofs.values()),
        unchanged_share=sum(proof.unchanged for proof in merged.values()) / max(survivors, 1),
        seconds=seconds,
    )


def _manifest(base: Checkpoint, options: MergeOptions, report: MergeReport) -> dict[str, Any]:
    inherited = {key: base.manifest[key] for key in ("pattern", "criterion", "sparsity") if key in base.manifest}
    trained = options.adapter / MANIFEST
    training = read_json(trained) if trained.is_file() else {}
    return {
        "tool": "spp",
        "version": __version__,
        "kind": "merged",
        "name": options.out.name,
        "licence": read_licence(base.folder),
        **inherited,
        "base": options.model,
        "adapter": str(options.adapter),
        "training": {key: training[key] for key in ("data", "settings", "steps", "tokens") if key in training},
        "verification": _totals(report),
    }


def _verification(base: Checkpoint, options: MergeOptions, report: MergeReport) -> dict[str, Any]:
    return {
        "tool": "spp",
        "version": __version__,
        "base": options.model,
        "adapter": str(options.adapter),
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
            "--rounding stochastic keeps them in the mean, --dtype float32 keeps every one",
            100 * report.unchanged_share,
        )
