"""Prove that every zero of one checkpoint is an exact +0.0 in another, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from spp.checkpoints.checkpoint import Checkpoint, is_buffer
from spp.checkpoints.fingerprint import fingerprint, tensor_digest
from spp.checkpoints.hub import resolve_model
from spp.checkpoints.obeying import Obedience, is_pruned
from spp.checkpoints.options import VerifyOptions
from spp.checkpoints.prefetch import read_ahead
from spp.checkpoints.verification_record import check_record, replaced_tensors
from spp.errors import UsageError
from spp.ops.dtypes import dtype_name
from spp.ops.zero_proof import TensorProof, compare
from spp.ops.zeros import count_non_finite, exactly_wider
from spp.runtime.progress import track_bytes


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The result of `verify`.

    Attributes:
        verified: every zero of BASE is +0.0 in OTHER, or the whole tensor is the same to the bit; BASE has zeros, and
            neither has NaN or infinity; the pattern, if one was asked for, is obeyed; no tensor with zeros is missing.
        other: None where BASE was checked against the record of its own merge.
        record: file of that record; None where two models were compared.
        zeros: zeros of BASE, over all tensors; with a record, those that it counts.
        tensors: proof of each tensor that has zeros or differs.
        problems: one sentence for each tensor that fails; empty if verified.
        compared: tensors that were looked into.
        replaced: tensors of which nothing is proved, because OTHER's manifest, or the record, says that training
            replaced them whole, by dense weights; a tensor that is pruned in BASE is never one.
        matrices_checked: matrices that were checked against the pattern, each expert by itself.
        matrices_dense: names of tensors with matrices that need not obey it.
        matrices_because: how it was known which have to obey.
        in_few_bits: tensors of OTHER whose survivors are stored in few bits, and so are not those of BASE.
        base_sha256, other_sha256: fingerprints of all tensors of either side (see `base_fingerprint`).
    """

    verified: bool
    base: str
    other: str | None
    record: str | None = None
    pattern: str | None
    zeros: int
    tensors: dict[str, TensorProof]
    problems: list[str]
    compared: int
    replaced: list[str] = field(default_factory=list)
    matrices_checked: int = 0
    matrices_dense: list[str] = field(default_factory=list)
    matrices_because: str | None = None
    in_few_bits: int = 0
    base_sha256: str
    other_sha256: str | None


def verify(options: VerifyOptions) -> VerifyReport:
    """Compare two checkpoints tensor by tensor, however large they are; or one with the record of its own proof.

    Raises:
        UsageError: a model or a record is missing, a target is no tensor, or the models have no tensor in common.
        SppError: a checkpoint or a record is damaged.
    """
    base = Checkpoint.open(resolve_model(options.base))
    if options.other is None:
        return _by_record(options, base)
    other = Checkpoint.open(resolve_model(options.other))
    if not set(base.files) & set(other.files):
        raise UsageError(f"{options.base} and {options.other} have no tensor name in common; are they the same model?")
    comparison = _Comparison(options, base, other)
    for name, (before, after) in _pairs(base, other):
        comparison.add(name, *before, *after)
    return comparison.report()


def _by_record(options: VerifyOptions, base: Checkpoint) -> VerifyReport:
    assert options.record is not None
    found = check_record(base, options.record)
    return VerifyReport(
        verified=not found.problems,
        base=options.base,
        other=None,
        record=str(options.record),
        pattern=None,
        zeros=found.zeros,
        tensors={},
        problems=found.problems,
        compared=found.compared,
        replaced=found.replaced,
        base_sha256=found.sha256,
        other_sha256=None,
    )


class _Comparison:
    """Two checkpoints, of which one pair of tensors is seen after the other."""

    def __init__(self, options: VerifyOptions, base: Checkpoint, other: Checkpoint) -> None:
        self._options, self._base, self._other = options, base, other
        self._obedience = options.pattern and Obedience.asked(options.pattern, options.targets, base, other)
        self._problems: list[str] = []
        self._proofs: dict[str, TensorProof] = {}
        self._digests: tuple[dict[str, str], dict[str, str]] = ({}, {})
        self._may_be_replaced = set(replaced_tensors(other.manifest))
        self._replaced = list((self._may_be_replaced & other.files.keys()) - base.files.keys())
        self._zeros = self._compared = 0

    def add(self, name: str, before: Tensor, digest: str, after: Tensor | None, other_digest: str | None) -> None:
        """Look into one pair, of which the digests are known."""
        self._digests[0][name] = digest
        if after is None or other_digest is None:
            self._problems += _missing(name, before)
            return
        self._digests[1][name] = other_digest
        same = digest == other_digest and before.dtype == after.dtype
        if after.shape != before.shape or not (same or _compares(before, after)):
            self._problems.append(f"{name}: BASE has {_kind(before)}, OTHER has {_kind(after)}")
            return
        self._compared += 1
        wide_before, wide_after = exactly_wider(before), exactly_wider(after)
        if wide_before is None or wide_after is None:
            if not same:
                self._problems.append(f"{name}: {dtype_name(before.dtype)} cannot be looked into, and the two differ")
            return
        if name in self._may_be_replaced and not same and not is_pruned(self._base, name, wide_before):
            self._replaced.append(name)
        else:
            self._compare(name, wide_before, wide_after, same=same)

    def _compare(self, name: str, before: Tensor, after: Tensor, *, same: bool) -> None:
        proof = compare(before, after)
        if not proof.holds and not same:  # a copied -0.0 is no change
            self._problems += failures(name, proof)
        if not self._options.allow_nonfinite and (count := count_non_finite(before)):
            self._problems.append(
                f"{name}: {count} entries of BASE are NaN or infinite; pass --allow-nonfinite if that is meant to be"
            )
        if proof.zeros or proof.unchanged != proof.survivors:
            self._proofs[name] = proof
        self._zeros += proof.zeros
        if self._obedience and (
            problem := self._obedience.check(name, before, after, transposed=self._base.transposed(name))
        ):
            self._problems.append(problem)

    def report(self) -> VerifyReport:
        """What was found."""
        if self._obedience:
            self._problems += self._obedience.missing()
        if not self._zeros and not self._options.allow_dense:
            self._problems.append(
                f"{self._options.base} is dense: it has no zero that could be kept, so that there is nothing to prove; "
                "give the pruned model as BASE, or pass --allow-dense"
            )
        extra = {
            name: tensor_digest(self._other.read(name)) for name in self._other.names if name not in self._digests[1]
        }
        checked = self._obedience
        return VerifyReport(
            verified=not self._problems,
            base=self._options.base,
            other=self._options.other,
            pattern=str(checked.pattern) if checked else None,
            zeros=self._zeros,
            tensors=self._proofs,
            problems=self._problems,
            compared=self._compared,
            replaced=sorted(self._replaced),
            matrices_checked=checked.matrices if checked else 0,
            matrices_dense=checked.dense if checked else [],
            matrices_because=checked.because if checked else None,
            in_few_bits=sum(entry.few_bits is not None for entry in self._other.packed.values()),
            base_sha256=fingerprint(self._base, self._digests[0]),
            other_sha256=fingerprint(self._other, self._digests[1] | extra),
        )


_Read = tuple[Tensor, str] | tuple[None, None]


def _pairs(base: Checkpoint, other: Checkpoint) -> Iterator[tuple[str, tuple[tuple[Tensor, str], _Read]]]:
    """Every tensor of BASE with OTHER's, in the order of BASE's files, each with its digest.

    Two pairs are in memory at once: while one is compared, the next one is read, and its digests are computed.
    """

    def with_digest(checkpoint: Checkpoint, name: str) -> tuple[Tensor, str]:
        tensor = checkpoint.read(name)
        return tensor, tensor_digest(tensor)

    def read(name: str) -> tuple[tuple[Tensor, str], _Read]:
        return with_digest(base, name), with_digest(other, name) if name in other.files else (None, None)

    sizes = {name: layout.nbytes for name, layout in base.layouts.items()}
    with track_bytes("verifying", sum(sizes.values())) as advance:
        for name, pair in read_ahead(read, base.names):
            yield name, pair
            advance(sizes[name])


def failures(name: str, proof: TensorProof) -> list[str]:
    """The problems that a tensor's proof found, one sentence each."""
    problems = []
    if proof.offenders:
        negative = f" ({proof.negative_zeros} of them -0.0)" if proof.negative_zeros else ""
        problems.append(f"{name}: {proof.offenders} of {proof.zeros} zeros of BASE are not +0.0 in OTHER{negative}")
    if proof.non_finite:
        problems.append(f"{name}: {proof.non_finite} entries turned NaN or infinite")
    return problems


def _missing(name: str, before: Tensor) -> list[str]:
    """What is wrong with a tensor of BASE that OTHER lacks: nothing, where no zero is lost with it."""
    if is_buffer(name):
        return []
    if (wide := exactly_wider(before)) is None:
        return [f"{name}: missing, and {dtype_name(before.dtype)} cannot be looked into"]
    zeros = int((wide == 0).count_nonzero())
    return [f"{name}: missing, and BASE has {zeros} zeros in it"] if zeros else []


def _compares(before: Tensor, after: Tensor) -> bool:
    """Whether two tensors are numbers of the same kind: both floats of whatever width, or of the same dtype."""
    return before.dtype == after.dtype or (before.dtype.is_floating_point and after.dtype.is_floating_point)


def _kind(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} of shape {tuple(tensor.shape)}"
