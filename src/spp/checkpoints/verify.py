"""Prove that every zero of one checkpoint is an exact +0.0 in another, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spp.checkpoints.checkpoint import Checkpoint
from spp.checkpoints.hub import resolve_model
from spp.checkpoints.options import VerifyOptions
from spp.checkpoints.prefetch import read_ahead
from spp.errors import UsageError
from spp.ops.dtypes import dtype_name
from spp.ops.zero_proof import TensorProof, compare
from spp.ops.zeros import is_float
from spp.patterns import Pattern
from spp.runtime.progress import track_bytes


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The result of `verify`.

    Attributes:
        verified: every zero of BASE is +0.0 in OTHER, or the whole tensor is the same to the bit; nothing turned NaN or
            infinite, the pattern (if one was asked for) is obeyed, and no tensor with zeros is missing.
        zeros: zeros of BASE, over all tensors.
        tensors: proof of each tensor that has zeros or differs.
        problems: what is wrong, one sentence a tensor; empty where verified.
    """

    verified: bool
    base: str
    other: str
    pattern: str | None
    zeros: int
    tensors: dict[str, TensorProof]
    problems: list[str]


def verify(options: VerifyOptions) -> VerifyReport:
    """Compare two checkpoints tensor by tensor, however large they are.

    Raises:
        UsageError: a model is missing, or the two have no tensor in common.
        SppError: a checkpoint is damaged.
    """
    base, other = (Checkpoint.open(resolve_model(model)) for model in (options.base, options.other))
    if not set(base.files) & set(other.files):
        raise UsageError(f"{options.base} and {options.other} have no tensor name in common; are they the same model?")
    pattern = options.pattern

    tensors: dict[str, TensorProof] = {}
    problems: list[str] = []
    pruned = 0
    for name, (before, after) in _pairs(base, other):
        if not is_float(before):
            continue
        if after is None:
            if zeros := int((before == 0).count_nonzero()):
                problems.append(f"{name}: missing, and BASE has {zeros} zeros in it")
            continue
        if after.shape != before.shape or not is_float(after):
            problems.append(f"{name}: BASE has {_kind(before)}, OTHER has {_kind(after)}")
            continue
        proof = compare(before, after)
        if not proof.holds and not _same_bytes(before, after):  # a copied -0.0 is as it was
            problems += failures(name, proof)
        if proof.zeros or proof.unchanged != proof.survivors:
            tensors[name] = proof
        if pattern and before.ndim == 2 and proof.zeros >= pattern.sparsity / 2 * before.numel():
            pruned += 1
            matrix = after.T if base.transposed(name) else after
            if violations := pattern.violations(matrix):
                problems.append(f"{name}: {violations} {_unit(pattern)} break the pattern {pattern}")
    if pattern and not pruned:
        problems.append(f"no weight of BASE is sparse enough for the pattern {pattern}: is BASE the pruned model?")
    return VerifyReport(
        verified=not problems,
        base=options.base,
        other=options.other,
        pattern=str(pattern) if pattern else None,
        zeros=sum(proof.zeros for proof in tensors.values()),
        tensors=tensors,
        problems=problems,
    )


def _pairs(base: Checkpoint, other: Checkpoint) -> Iterator[tuple[str, tuple[Tensor, Tensor | None]]]:
    """Every tensor of BASE with OTHER's, in the order of BASE's files; two pairs are in memory at once."""

    def read(name: str) -> tuple[Tensor, Tensor | None]:
        return base.read(name), other.read(name) if name in other.files else None

    sizes = {name: layout.nbytes for name, layout in base.layouts.items()}
    with track_bytes("verifying", sum(sizes.values())) as advance:
        for name, pair in read_ahead(read, base.names):
            yield name, pair
            advance(sizes[name])


def failures(name: str, proof: TensorProof) -> list[str]:
    """What a tensor's proof failed on, in words."""
    problems = []
    if proof.offenders:
        negative = f" ({proof.negative_zeros} of them -0.0)" if proof.negative_zeros else ""
        problems.append(f"{name}: {proof.offenders} of {proof.zeros} zeros of BASE are not +0.0 in OTHER{negative}")
    if proof.non_finite:
        problems.append(f"{name}: {proof.non_finite} entries turned NaN or infinite")
    return problems


def _same_bytes(before: Tensor, after: Tensor) -> bool:
    if before.dtype != after.dtype:
        return False
    # Flat, because a tensor without dimensions has no bytes to be viewed as.
    return before.reshape(-1).view(torch.uint8).equal(after.reshape(-1).view(torch.uint8))


def _kind(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} of shape {tuple(tensor.shape)}"


def _unit(pattern: Pattern) -> str:
    return "groups" if ":" in str(pattern) else "rows"
