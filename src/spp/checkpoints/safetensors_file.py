"""Write a safetensors file tensor by tensor, in any order and in several runs: for models larger than memory.

The format is a header, which says where each tensor lies, and the tensors' bytes one after the other. So if names,
dtypes and shapes are known, the file can be laid out first and filled later.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from spp.checkpoints.json_files import sync
from spp.errors import SppError
from spp.ops.dtypes import FLOATS
from spp.runtime.files import reading, writing

_ALIGNMENT = 8
_PIECE = 2**23  # bytes that are copied at once


@dataclass(frozen=True)
class Layout:
    """A tensor in a file: its dtype by its safetensors name (`BF16`), its shape, and its size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


_DTYPES = {one.safetensors: dtype for dtype, one in FLOATS.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()} | {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}


def in_dtype(layout: Layout, dtype: torch.dtype) -> Layout:
    """The layout of the tensor in another float dtype; unchanged unless it holds floats of 16 bits or more."""
    if not is_float_layout(layout):
        return layout
    return float_layout(FLOATS[dtype].safetensors, layout.shape)


def float_layout(dtype: str, shape: tuple[int, ...]) -> Layout:
    """The layout of a tensor of floats of 16 bits or more."""
    return Layout(dtype, shape, torch.Size(shape).numel() * _DTYPES[dtype].itemsize)


def is_float_layout(layout: Layout) -> bool:
    """Whether a tensor holds floats of 16 bits or more."""
    return layout.dtype in _DTYPES


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        layouts: tensor name -> layout.
        offsets: tensor name -> offset of its bytes in the file.
        metadata: name -> text.
    """

    layouts: dict[str, Layout]
    offsets: dict[str, int]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read a file's header; safetensors checks that it is valid and that the file has the right length.

    Raises:
        SppError: the file is missing, truncated or damaged.
    """
    if not path.exists():
        raise SppError(f"{path}: the index names this shard, but it is not there")
    with reading(path, "a whole safetensors file"):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        with path.open("rb") as plain:
            size = int.from_bytes(plain.read(8), "little")
            entries = json.loads(plain.read(size))
        entries.pop("__metadata__", None)
        layouts, offsets = {}, {}
        for name, entry in sorted(entries.items()):
            start, end = entry["data_offsets"]
            layouts[name] = Layout(entry["dtype"], tuple(entry["shape"]), end - start)
            offsets[name] = 8 + size + start
    return Header(layouts, offsets, metadata)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file from tensors in memory: the same bytes for the same content, unlike safetensors' own.

    It is written in place, to be part of a folder that appears whole, and replaces a file of that name.

    Raises:
        OSError: it cannot be written; it names the file.
    """
    layouts = {
        name: Layout(_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
        for name, tensor in sorted(tensors.items())
    }
    header, offsets = _header(layouts, metadata or {})
    with writing(path), path.open("wb", buffering=0) as file:
        _write_all(file, memoryview(header))
        for name in sorted(offsets, key=offsets.__getitem__):
            _write_all(file, _bytes_of(tensors[name]))


def read_floats(path: Path, offset: int, layout: Layout) -> Tensor | None:
    """Read the tensor whose bytes begin at `offset`; None unless it holds floats of 16 bits or more.

    It is read into memory at once: safetensors would return a memory map of the file, whose pages are read only when
    they are used, so that the computation waits for the disk.

    Raises:
        OSError: the file ends too early.
    """
    if not is_float_layout(layout):
        return None
    tensor = torch.empty(layout.nbytes, dtype=torch.uint8)
    array: Any = tensor.numpy()
    left = memoryview(array)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while left:
            count = file.readinto(left)
            if not count:
                raise OSError(f"{path} ends {len(left)} bytes too early")
            left = left[count:]
    return tensor.view(_DTYPES[layout.dtype]).view(layout.shape)


class TensorFile:
    """A safetensors file that is written tensor by tensor; it has its final size from the start.

    Args:
        path: the file; an existing one of this layout is continued.
        tensors: name -> layout.

    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Layout]) -> None:
        self.path = path
        header, self._offsets = _header(tensors, {})
        self._sizes = {name: layout.nbytes for name, layout in tensors.items()}
        size = len(header) + sum(self._sizes.values())
        if not self._is_laid_out(header, size):
            self._lay_out(header, size)

    def _is_laid_out(self, header: bytes, size: int) -> bool:
        if not self.path.is_file() or self.path.stat().st_size != size:
            return False
        with self.path.open("rb") as file:
            return file.read(len(header)) == header

    def _lay_out(self, header: bytes, size: int) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            with writing(partial):
                with partial.open("wb") as file:
                    if hasattr(os, "posix_fallocate"):  # a full disk is noticed now, and not after hours of work
                        os.posix_fallocate(file.fileno(), 0, size)
                    file.truncate(size)
                    file.write(header)
                sync(partial)
                partial.rename(self.path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place.

        Raises:
            ValueError: its size differs from its layout's.
            OSError: it cannot be written.
        """
        data = _bytes_of(tensor)
        if len(data) != self._sizes[name]:
            raise ValueError(f"{name} has {len(data)} bytes, and {self._sizes[name]} are laid out for it")
        with writing(self.path), self.path.open("r+b", buffering=0) as file:
            file.seek(self._offsets[name])
            _write_all(file, data)

    def digest(self, name: str) -> str:
        """SHA-256 of what lies in a tensor's place."""
        digest, left = hashlib.sha256(), self._sizes[name]
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._offsets[name])
            while left and (piece := file.read(min(left, _PIECE))):
                digest.update(piece)
                left -= len(piece)
        return digest.hexdigest()

    def copy(self, name: str, source: Path, offset: int) -> None:
        """Copy a tensor to its place from another file, in which its bytes begin at `offset`.

        Raises:
            OSError: the file ends too early, or the tensor cannot be written.
        """
        left = self._sizes[name]
        piece = memoryview(bytearray(min(left, _PIECE)))
        with source.open("rb", buffering=0) as old, self.path.open("r+b", buffering=0) as new:
            old.seek(offset)
            new.seek(self._offsets[name])
            while left:
                count = old.readinto(piece[: min(left, _PIECE)])
                if not count:
                    raise OSError(f"{source} ends within {name}")
                with writing(self.path):
                    _write_all(new, piece[:count])
                left -= count


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _write_all(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _header(tensors: Mapping[str, Layout], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where each tensor begins; wide dtypes come first, so that all are aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    starts: dict[str, int] = {}
    end = 0
    for name, layout in sorted(tensors.items(), key=lambda item: -_width(item[1])):
        starts[name], end = end, end + layout.nbytes
        entries[name] = {"dtype": layout.dtype, "shape": list(layout.shape), "data_offsets": [starts[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: first + start for name, start in starts.items()}


def _width(layout: Layout) -> int:
    """Bytes of one entry."""
    count = torch.Size(layout.shape).numel()
    return layout.nbytes // count if count else 0
