"""`spp pack` and `spp unpack`: an exact round trip, and damaged archives named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spp.checkpoints.checkpoint import Checkpoint
from spp.checkpoints.fingerprint import base_fingerprint
from spp.checkpoints.options import PackOptions, UnpackOptions, VerifyOptions
from spp.checkpoints.pack import unpack
from spp.checkpoints.packed_archive import archive_files
from spp.checkpoints.verify import verify
from spp.errors import SppError, UsageError
from spp.models.architecture import prunable_linears
from spp.ops.zeros import canonical_zeros
from spp.pruning.pack import pack


@pytest.fixture(params=["llama", "gpt2"])
def source(request, tmp_path, tiny_model):
    """A sparse model in shards, with a -0.0 and a NaN with a payload."""
    model = tiny_model(request.param, dtype=torch.bfloat16)
    layers = list(prunable_linears(model).values())
    for layer in layers:
        layer.weight.data[:, ::2] = 0
    weight = layers[0].weight.data
    weight[0, 0] = -0.0
    weight.view(torch.int16)[1, 1] = 0x7FA5
    folder = tmp_path / "source"
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def as_bits(folder):
    """Tensor name -> bits, dtype and shape, of a checkpoint with plain safetensors."""
    checkpoint = Checkpoint.open(folder)
    return {n: (t.view(torch.uint8).tolist(), t.dtype, t.shape) for n, t in checkpoint.items()}


def test_the_round_trip_is_exact(source, tmp_path):
    packed = pack(PackOptions(model=str(source), out=tmp_path / "archive"))
    assert packed.packed == len(prunable_names(source)) and packed.archive_bytes < packed.dense_bytes
    assert not list((tmp_path / "archive").glob("model*"))
    unpack(UnpackOptions(model=str(tmp_path / "archive"), out=tmp_path / "back"))
    expected = {
        name: (canonical_zeros(tensor).view(torch.uint8).tolist(), tensor.dtype, tensor.shape)
        for name, tensor in Checkpoint.open(source).items()
    }
    assert as_bits(tmp_path / "back") == expected
    assert as_bits(tmp_path / "archive") == expected  # an archive reads as the model
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in (tmp_path / "back").iterdir()} == names | {"spp.json"}
    index, back = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (source, tmp_path / "back"))
    assert index["weight_map"] == back["weight_map"]


def prunable_names(folder):
    return [
        name
        for name, tensor in Checkpoint.open(folder).items()
        if tensor.ndim == 2 and (tensor == 0).float().mean() > 0.3
    ]


def test_a_matrix_of_zeros_alone_comes_back(source, tmp_path):
    for path in source.glob("model*"):
        path.unlink()
    save_file({"zeros": torch.zeros(8, 16, dtype=torch.bfloat16)}, source / "model.safetensors", {"format": "pt"})
    pack(PackOptions(model=str(source), out=tmp_path / "archive"))
    unpack(UnpackOptions(model=str(tmp_path / "archive"), out=tmp_path / "back"))
    assert as_bits(tmp_path / "back") == as_bits(source)


def test_the_same_model_gives_the_same_bytes_that_others_may_read(source, tmp_path):
    for name in ("first", "second"):
        pack(PackOptions(model=str(source), out=tmp_path / name))
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
        assert path.stat().st_mode == (tmp_path / "first" / "spp.json").stat().st_mode


def test_an_archive_is_the_same_model_to_the_other_commands(source, tmp_path):
    pack(PackOptions(model=str(source), out=tmp_path / "archive"))
    assert base_fingerprint(tmp_path / "archive") == base_fingerprint(source) or has_negative_zero(source)
    options = VerifyOptions(base=str(source), other=str(tmp_path / "archive"), allow_nonfinite=True)
    assert verify(options).verified


def has_negative_zero(folder):
    return any(((t == 0) & t.signbit()).any() for _, t in Checkpoint.open(folder).items() if t.is_floating_point())


def test_what_is_refused(source, tmp_path, tiny_model):
    archive = tmp_path / "archive"
    pack(PackOptions(model=str(source), out=archive))
    with pytest.raises(UsageError, match="is a packed archive already"):
        pack(PackOptions(model=str(archive), out=tmp_path / "twice"))
    with pytest.raises(UsageError, match="is no packed archive"):
        unpack(UnpackOptions(model=str(source), out=tmp_path / "plain"))
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match="no matrix with 30% zeros"):
        pack(PackOptions(model=str(tmp_path / "dense"), out=tmp_path / "none"))
    with pytest.raises(UsageError, match="not empty"):
        pack(PackOptions(model=str(source), out=archive))
    assert not {"twice", "plain", "none"} & {path.name for path in tmp_path.iterdir()}


def first_weight(archive):
    path = next(path for path in archive_files(archive) if Checkpoint.open(archive).packed.keys() & names_in(path))
    name = next(iter(name for name in names_in(path) if name in Checkpoint.open(archive).packed))
    return path, name


def names_in(path):
    with safe_open(path, framework="pt") as file:
        return {name.removesuffix(".values") for name in file.keys()}  # noqa: SIM118


def rewritten(path, change, metadata=None):
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=old if metadata is None else metadata)


DAMAGE = {
    "values cut off": (lambda t, n: t.update({f"{n}.values": t[f"{n}.values"][:-3].clone()}), "there are"),
    "a bit flipped": (lambda t, n: t[f"{n}.bitmask"].bitwise_xor_(1), "another number of bits"),
    "offsets": (lambda t, n: t[f"{n}.row_offsets"].add_(1), "row_offsets run from 1"),
    "dtype": (lambda t, n: t.update({f"{n}.bitmask": t[f"{n}.bitmask"].long()}), "bitmask is"),
    "rows": (lambda t, n: t.update({f"{n}.bitmask": t[f"{n}.bitmask"][:-1].clone()}), "rows are expected"),
    "no dimension": (
        lambda t, n: t.update({f"{n}.values": torch.tensor(1.0)}),
        r"weight.values has the shape \(\), and 1 dimension",
    ),
    "too many dimensions": (
        lambda t, n: t.update({f"{n}.bitmask": t[f"{n}.bitmask"][None].clone()}),
        r"weight.bitmask has the shape \(1, ",
    ),
    "a part is missing": (lambda t, n: t.pop(f"{n}.row_offsets"), "row_offsets is missing"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_archive_is_named(source, tmp_path, what):
    archive = tmp_path / "archive"
    pack(PackOptions(model=str(source), out=archive))
    path, name = first_weight(archive)
    change, message = DAMAGE[what]
    rewritten(path, lambda tensors: change(tensors, name))
    with pytest.raises(SppError, match=message):
        unpack(UnpackOptions(model=str(archive), out=tmp_path / "back"))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "format 'pt'"),
        ({"format": "spp-packed", "version": "99"}, "version '99'"),
        ({"format": "spp-packed", "version": "1"}, "do not describe"),
        ({"format": "spp-packed", "version": "1", "weights": "[]"}, "do not describe"),
        (
            {"format": "spp-packed", "version": "1", "weights": '{"w": {"shape": [-1, 3], "transposed": false}}'},
            "not a sound",
        ),
    ],
)
def test_wrong_metadata_are_named(source, tmp_path, metadata, message):
    archive = tmp_path / "archive"
    pack(PackOptions(model=str(source), out=archive))
    rewritten(archive_files(archive)[0], lambda tensors: None, metadata)
    with pytest.raises(SppError, match=message):
        Checkpoint.open(archive)


def test_truncated_and_missing_files_are_named(source, tmp_path):
    archive = tmp_path / "archive"
    pack(PackOptions(model=str(source), out=archive))
    files = archive_files(archive)
    assert len(files) > 2
    files[1].write_bytes(files[1].read_bytes()[:-10])
    with pytest.raises(SppError, match="truncated"):
        Checkpoint.open(archive)
    files[1].unlink()
    with pytest.raises(SppError, match="files of the packed archive are there"):
        Checkpoint.open(archive)
