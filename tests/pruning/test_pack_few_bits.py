"""`spp pack --bits`: what the other commands make of such an archive, its size, and damaged ones, which are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import spp
from spp.checkpoints.checkpoint import Checkpoint
from spp.checkpoints.options import PackOptions
from spp.cli.entry_point import main
from spp.errors import SppError, UsageError
from spp.models.architecture import prunable_linears
from spp.ops.few_bits import BITS, GROUPS
from spp.pruning.few_bits.quantize import round_to_nearest


@pytest.fixture(params=["llama", "gpt2"])
def source(request, tmp_path, tiny_model) -> Path:
    """A model with half of the weights in its blocks removed, in shards."""
    model = tiny_model(request.param, dtype=torch.bfloat16)
    for layer in prunable_linears(model).values():
        weight = layer.get_parameter("weight").data
        weight[torch.rand(weight.shape) < 0.5] = 0
    folder = tmp_path / "source"
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def packed(source: Path, out: Path, bits: int = 4, **options: object) -> Path:
    spp.pack(PackOptions.build({"model": str(source), "out": out, "bits": bits, **options}))
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(Checkpoint.open(folder).items())


def test_the_options_are_those_of_the_layout() -> None:
    fields = PackOptions.model_fields
    bits, none = get_args(fields["bits"].annotation)
    assert get_args(bits) == BITS and none is type(None)
    assert get_args(fields["group"].annotation) == GROUPS
    with pytest.raises(UsageError, match=r"calibration chooses .*; group is about"):
        PackOptions.build({"model": "m", "out": "o", "calibration": "text", "group": "64"})
    with pytest.raises(UsageError, match="bits: input should be 8, 6, 5, 4, 3 or 2, but it is 7"):
        PackOptions.build({"model": "m", "out": "o", "bits": 7})


@pytest.mark.parametrize("bits", BITS)
def test_the_archive_reads_as_the_quantized_model(source: Path, tmp_path: Path, bits: int) -> None:
    archive = packed(source, tmp_path / "archive", bits, group=64)
    before, after = tensors(source), tensors(archive)
    assert before.keys() == after.keys()
    few = [name for name, entry in Checkpoint.open(archive).packed.items() if entry.few_bits]
    assert few
    for name, weight in before.items():
        expected = weight
        if name in few:
            transposed = Checkpoint.open(source).transposed(name)
            whole = round_to_nearest(weight.T if transposed else weight, bits, 64).values().to(weight.dtype)
            expected = whole.T if transposed else whole
        assert after[name].equal(expected) and after[name].dtype == weight.dtype
    spp.unpack(spp.UnpackOptions(model=str(archive), out=tmp_path / "plain"))
    assert all(tensor.equal(after[name]) for name, tensor in tensors(tmp_path / "plain").items())


def test_the_proof_is_about_the_zeros_and_says_how_far_survivors_moved(source: Path, tmp_path: Path, capsys) -> None:
    archive = packed(source, tmp_path / "archive", 3)
    report = spp.verify(spp.VerifyOptions(base=str(source), other=str(archive)))
    assert report.verified and report.in_few_bits == len(Checkpoint.open(archive).packed)
    before, after = tensors(source), tensors(archive)
    for name in Checkpoint.open(archive).packed:
        kept, proof = before[name] != 0, report.tensors[name]
        off = ((after[name].float() - before[name].float()).abs() / before[name].float().abs())[kept]
        assert proof.largest_relative_change == pytest.approx(float(off.max())) and proof.underflowed == 0
    assert spp.verify(spp.VerifyOptions(base=str(source), other=str(source))).in_few_bits == 0
    assert main(["verify", str(source), str(archive)]) == 0
    most = max(proof.largest_relative_change for proof in report.tensors.values())
    assert f"is off by {most:.3g} times its size" in " ".join(capsys.readouterr().out.split())


def test_fewer_bits_are_smaller_files_and_larger_errors(source: Path, tmp_path: Path) -> None:
    reports = [
        spp.pack(PackOptions.build({"model": str(source), "out": tmp_path / str(bits), "bits": bits})) for bits in BITS
    ]
    sizes, errors = [one.archive_bytes for one in reports], [sum(one.errors.values()) for one in reports]
    assert sizes == sorted(sizes, reverse=True) and errors == sorted(errors)
    manifest = json.loads((tmp_path / "4" / "spp.json").read_text())
    assert manifest["few_bits"]["bits"] == 4 and manifest["few_bits"]["errors"] == reports[BITS.index(4)].errors


def test_inspect_says_which_weights_are_in_few_bits(source: Path, tmp_path: Path) -> None:
    archive = packed(source, tmp_path / "archive", 3)
    before, after = (spp.inspect(spp.InspectOptions(model=str(one))).matrices for one in (source, archive))
    few = Checkpoint.open(archive).packed
    assert {name: one.dtype for name, one in after.items()} == {
        name: "3 bit" if name in few else "bfloat16" for name in before
    }
    assert {name: (one.zeros, one.pattern) for name, one in after.items()} == {
        name: (one.zeros, one.pattern) for name, one in before.items()
    }


def test_the_same_model_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    first, second = (packed(source, tmp_path / name) for name in ("first", "second"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_what_few_bits_cannot_hold_is_named_and_nothing_is_written(source: Path, tmp_path: Path) -> None:
    path = next(path for path in source.glob("*.safetensors") if any("mlp" in name for name in load_file(path)))
    name = next(name for name in load_file(path) if "mlp" in name and load_file(path)[name].ndim == 2)
    for bad, told in ((float("nan"), "NaN or infinity"), (1e30, "too large for few bits")):
        changed = load_file(path)
        changed[name][0, 0] = bad
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(SppError, match=f"{name}: .*{told}"):
            packed(source, tmp_path / "archive")
        assert not (tmp_path / "archive").exists()


def first_weight(archive: Path) -> tuple[Path, str]:
    checkpoint = Checkpoint.open(archive)
    name = next(iter(checkpoint.packed))
    return checkpoint.files[name], name


def rewrite(path: Path, change, metadata=lambda text: text) -> None:
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    changed = load_file(path)
    change(changed)
    save_file(changed, path, {**old, "weights": metadata(old["weights"])})


DAMAGE = {
    "codes cut off": (lambda t, n: t.update({f"{n}.codes": t[f"{n}.codes"][:-3].clone()}), "codes"),
    "bits beyond the codes": (lambda t, n: t[f"{n}.codes"][-1].fill_(1), "bits beyond the last code"),
    "a bit of the mask": (lambda t, n: t[f"{n}.bitmask"].bitwise_xor_(1), "another number of bits"),
    "counts": (lambda t, n: t[f"{n}.row_offsets"].add_(1), "row_offsets run from 1"),
    "a scale of zero": (lambda t, n: t[f"{n}.scales"][0].fill_(0), "scales are zero or not finite"),
    "a scale of NaN": (lambda t, n: t[f"{n}.scales"][0].fill_(float("nan")), "scales are zero or not finite"),
    "large scales": (lambda t, n: t[f"{n}.scales"].fill_(6e4), "would exceed"),
    "a zero in the codebook": (lambda t, n: t[f"{n}.codebook"][3].fill_(0), "the codebook has a zero"),
    "scales of another group": (lambda t, n: t.update({f"{n}.scales": t[f"{n}.scales"].repeat(1, 2)}), "scales is"),
    "dtype": (lambda t, n: t.update({f"{n}.scales": t[f"{n}.scales"].float()}), "scales is"),
    "rows": (lambda t, n: t.update({f"{n}.bitmask": t[f"{n}.bitmask"][:-1].clone()}), "rows are expected"),
    "dimensions": (lambda t, n: t.update({f"{n}.codes": t[f"{n}.codes"][None].clone()}), "1 dimensions are expected"),
    "a part is missing": (lambda t, n: t.pop(f"{n}.scales"), "scales is missing"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_archive_is_named(source: Path, tmp_path: Path, what: str) -> None:
    archive = packed(source, tmp_path / "archive")
    path, name = first_weight(archive)
    change, message = DAMAGE[what]
    rewrite(path, lambda changed: change(changed, name))
    with pytest.raises(SppError, match=message) as error:
        spp.unpack(spp.UnpackOptions(model=str(archive), out=tmp_path / "back"))
    assert name in str(error.value) and not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"bits": 3}, "codes is|codebook is"),
        ({"bits": 7}, "known are 8, 6, 5, 4, 3, 2 bits"),
        ({"group": 32}, "groups of 64 and 128"),
        ({"dtype": "F8_E4M3"}, "known are"),
        ({"bits": "many"}, "do not describe packed weights"),
        ({"bits": None}, "do not describe packed weights"),
    ],
)
def test_bits_that_do_not_fit_are_named(source: Path, tmp_path: Path, entry: dict, message: str) -> None:
    archive = packed(source, tmp_path / "archive")
    path, name = first_weight(archive)

    def changed(text: str) -> str:
        weights = json.loads(text)
        return json.dumps(weights | {name: weights[name] | entry})

    rewrite(path, lambda _: None, changed)
    with pytest.raises(SppError, match=message):
        Checkpoint.open(archive).tensor(name)
