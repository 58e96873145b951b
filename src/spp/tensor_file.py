"""Write a safetensors file tensor by tensor, in any order, at any time: for models that never are in memory as a whole.

The format is a header, which says where each tensor lies, and the tensors' bytes one after the other. So where names,
dtypes and shapes are known, a file can be laid out first and filled later, by several runs if need be.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spp.folders import sync

_ALIGNMENT = 8


@dataclass(frozen=True)
class Layout:
    """What a file says of one tensor: its dtype as safetensors names it (`BF16`), its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_layouts(path: Path) -> dict[str, Layout]:
    """The layouts of all tensors in a sound file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        name: Layout(entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


class TensorFile:
    """A safetensors file in the making, which has its final size from the start.

    Args:
        path: where; one that is there already is gone on with.
        tensors: name -> layout.

    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Layout]) -> None:
        self.path = path
        header, self._offsets = _header(tensors)
        self._sizes = {name: layout.nbytes for name, layout in tensors.items()}
        if not path.is_file():
            self._lay_out(header, len(header) + sum(self._sizes.values()))

    def _lay_out(self, header: bytes, size: int) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial")
        with partial.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is noticed now, and not after hours of work
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
            file.write(header)
        sync(partial)
        partial.rename(self.path)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place.

        Raises:
            ValueError: it has not as many bytes as its layout says.
            OSError: it cannot be written.
        """
        array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        data = memoryview(array)
        if len(data) != self._sizes[name]:
            raise ValueError(f"{name} has {len(data)} bytes, and {self._sizes[name]} are laid out for it")
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self._offsets[name])
            while data:
                data = data[file.write(data) :]


def _header(tensors: Mapping[str, Layout]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where each tensor begins; wide dtypes come first, so that all are aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
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
