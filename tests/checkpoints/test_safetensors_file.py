"""Files filled tensor by tensor, in any order and by several runs: safetensors reads what was written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spp.checkpoints.safetensors_file import Layout, TensorFile, read_floats, read_header

TENSORS = {
    "odd": torch.arange(7, dtype=torch.uint8),
    "bf16": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "double": torch.tensor([[1.5, -0.0], [float("nan"), 1e-310]], dtype=torch.float64),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.empty(0, 4),
    "fp8": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
    "transposed": torch.arange(12.0).view(3, 4).T,
}


@pytest.fixture
def layouts(tmp_path: Path) -> dict[str, Layout]:
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "source.safetensors")
    return read_header(tmp_path / "source.safetensors").layouts


def test_layouts_are_what_the_file_holds(layouts: dict[str, Layout]) -> None:
    assert layouts.keys() == TENSORS.keys()
    assert layouts["bf16"] == Layout("BF16", (3, 5), 30)
    assert layouts["empty"] == Layout("F32", (0, 4), 0)
    assert layouts["scalar"] == Layout("I64", (), 8)


@pytest.mark.parametrize("order", [list(TENSORS), sorted(TENSORS), sorted(TENSORS, reverse=True)])
def test_reads_as_written(tmp_path: Path, layouts: dict[str, Layout], order: list[str]) -> None:
    path = tmp_path / "new.safetensors"
    for name in order:
        TensorFile(path, {name: layouts[name] for name in TENSORS}).write(name, TENSORS[name])  # each by another run
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes(read[name].reshape(-1).view(torch.uint8)) == bytes(tensor.reshape(-1).view(torch.uint8))
    assert [path.name for path in tmp_path.glob("*new*")] == ["new.safetensors"]


def test_every_tensor_is_aligned(tmp_path: Path, layouts: dict[str, Layout]) -> None:
    file = TensorFile(tmp_path / "new.safetensors", layouts)
    for name, tensor in TENSORS.items():
        assert not tensor.numel() or file._offsets[name] % tensor.element_size() == 0


def test_a_tensor_of_another_size_is_refused(tmp_path: Path, layouts: dict[str, Layout]) -> None:
    file = TensorFile(tmp_path / "new.safetensors", layouts)
    with pytest.raises(ValueError, match="bf16 has 60 bytes, and 30 are laid out"):
        file.write("bf16", torch.ones(3, 5))


def test_a_full_disk_is_noticed_before_anything_is_there(
    tmp_path: Path, layouts: dict[str, Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        TensorFile(tmp_path / "new.safetensors", layouts)
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 7)])
def test_floats_are_read_to_the_bit(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    tensor = bits.view(dtype).reshape(shape)
    path = tmp_path / "x.safetensors"
    save_file({"before": torch.ones(3), "tensor": tensor, "count": torch.tensor([7])}, path)
    header = read_header(path)
    found = read_floats(path, header.offsets["tensor"], header.layouts["tensor"])
    assert found is not None and found.dtype == dtype and found.shape == shape
    assert found.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    assert read_floats(path, header.offsets["count"], header.layouts["count"]) is None


def test_floats_that_end_too_early_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"tensor": torch.ones(8)}, path)
    header = read_header(path)
    layout, offset = header.layouts["tensor"], header.offsets["tensor"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(OSError, match="ends 3 bytes too early"):
        read_floats(path, offset, layout)
