"""Folders of safetensors on disk: find them, and read them tensor by tensor.

A packed archive (see `spp.checkpoints.packed_archive`) reads as the dense model that it was made from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from spp.checkpoints import packed_archive
from spp.checkpoints.conv1d import stores_transposed
from spp.checkpoints.json_files import read_json, read_object
from spp.checkpoints.safetensors_file import (
    Header,
    Layout,
    float_layout,
    is_float_layout,
    read_floats,
    read_header,
)
from spp.errors import SppError, UsageError
from spp.ops.few_bits import FewBitWeight
from spp.ops.packed import PackedWeight

MANIFEST = "spp.json"
"""Side file in every folder that spp writes: how the folder was made, and from what. Separate from `config.json`."""

VERIFICATION = "verification.json"
"""Side file of a merged model: the proof of every merged tensor."""

# Tensors that files of older versions of transformers hold, and that a model computes itself.
_BUFFERS = re.compile(r"(\.rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias|position_ids)$")

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one model folder, read lazily.

    Attributes:
        folder: the model's folder.
        files: tensor name -> the file that holds it, in the order of the files.
        headers: file -> its header.
        packed: name -> entry, of the packed weights.
    """

    folder: Path
    files: dict[str, Path]
    headers: dict[Path, Header] = field(default_factory=dict)
    packed: dict[str, packed_archive.PackedEntry] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the index of a single-file or sharded checkpoint or an archive, and the header of every shard.

        Raises:
            UsageError: the folder holds no safetensors model.
            SppError: a shard is missing or truncated, or contradicts the index; or the index names files elsewhere.
        """
        if (folder / SINGLE).is_file():  # first, as in transformers: where both are there, both read the same weights
            header = read_header(folder / SINGLE)
            return cls(folder, dict.fromkeys(header.layouts, folder / SINGLE), {folder / SINGLE: header})
        if (folder / INDEX).is_file():
            return cls._open_sharded(folder)
        if paths := packed_archive.archive_files(folder):
            return cls._open_archive(folder, paths)
        hint = ""
        if (folder / ADAPTER).is_file():
            hint = " (it is an adapter: give the model that it is for, or merge the two first)"
        elif any(folder.glob("*.bin")):
            hint = " (there are .bin files: load and save the model with transformers to convert them)"
        raise UsageError(f"{folder}: neither {SINGLE} nor {INDEX} is there{hint}")

    @classmethod
    def _open_sharded(cls, folder: Path) -> Checkpoint:
        index = _index(folder / INDEX)
        headers = {folder / shard: read_header(folder / shard) for shard in sorted(set(index.values()))}
        _require_agreement(folder, index, headers)
        files = {name: path for path, header in headers.items() for name in header.layouts}
        return cls(folder, files, headers)

    @classmethod
    def _open_archive(cls, folder: Path, paths: list[Path]) -> Checkpoint:
        files: dict[str, Path] = {}
        packed: dict[str, packed_archive.PackedEntry] = {}
        headers = {path: read_header(path) for path in paths}
        for path, header in headers.items():
            entries = packed_archive.entries(path, header)
            plain = packed_archive.plain_names(list(header.layouts), entries)
            if repeated := [name for name in plain if name in files]:
                other = files[repeated[0]].name
                raise SppError(f"{path}: it holds {repeated[0]}, which {other} holds as well; copy the archive again")
            files |= dict.fromkeys(plain, path)
            packed |= entries
        return cls(folder, files, headers, packed)

    @property
    def names(self) -> list[str]:
        """All tensor names."""
        return list(self.files)

    @property
    def shards(self) -> dict[Path, list[str]]:
        """File -> names of the tensors in it."""
        shards: dict[Path, list[str]] = {}
        for name, path in self.files.items():
            shards.setdefault(path, []).append(name)
        return shards

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json.

        Raises:
            UsageError: there is none.
            SppError: it is not a JSON object.
        """
        return read_object(self.folder / "config.json")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The content of spp.json; empty if spp did not write the model."""
        path = self.folder / MANIFEST
        return read_object(path) if path.is_file() else {}

    def require_unquantized(self, remedy: str) -> None:
        """Check that the model is not quantized.

        Raises:
            UsageError: it is; the message ends with `remedy`.
        """
        if not is_plain(self.config.get("quantization_config")):
            raise UsageError(f"{self.folder} is quantized; {remedy}")

    def transposed(self, name: str) -> bool:
        """Whether a weight matrix is stored as (I, O), as GPT-2's Conv1D does, instead of (O, I)."""
        return stores_transposed(self.config.get("model_type", ""), name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, and only this one; a packed one is expanded.

        Raises:
            SppError: a packed weight is damaged.
        """
        with safe_open(self.files[name], framework="pt") as file:
            return self._read(file, name)

    def read(self, name: str) -> Tensor:
        """As `tensor`, but read into memory before it returns: plain float tensors are not a memory map of the file.

        Raises:
            OSError: the file has become shorter.
        """
        if name in self.packed:
            return self.tensor(name)
        found = read_floats(self.files[name], self.offsets[name], self.layouts[name])
        return self.tensor(name) if found is None else found

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self.layouts[name].shape

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """Name -> dtype, shape and bytes of every tensor; for a packed one, those of the dense tensor."""
        stored = {name: layout for header in self.headers.values() for name, layout in header.layouts.items()}
        return {name: self._packed_layout(name, stored) if name in self.packed else stored[name] for name in self.files}

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Name -> offset of its bytes in its file, of the tensors that are not packed."""
        return {name: self.headers[path].offsets[name] for name, path in self.files.items() if name not in self.packed}

    def _packed_layout(self, name: str, stored: dict[str, Layout]) -> Layout:
        if few := self.packed[name].few_bits:
            return float_layout(few.dtype, self.packed[name].shape)
        values = stored[f"{name}.{packed_archive.VALUES}"]
        if not is_float_layout(values):
            raise SppError(f"{self.folder}: the values of {name} are stored as {values.dtype}; it is damaged")
        return float_layout(values.dtype, self.packed[name].shape)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, one in memory at a time."""
        for path, names in self.shards.items():
            with safe_open(path, framework="pt") as file:
                for name in names:
                    yield name, self._read(file, name)

    def _read(self, file: Any, name: str) -> Tensor:
        if name not in self.packed:
            return file.get_tensor(name)
        entry = self.packed[name]
        return packed_archive.dense(packed_archive.read_weight(file.get_tensor, name, entry), entry)

    def packed_weight(self, name: str) -> PackedWeight | FewBitWeight | None:
        """A packed weight (O, I) as it is, checked; None where the archive has no such weight.

        Raises:
            SppError: it is damaged.
        """
        if name not in self.packed:
            return None
        with safe_open(self.files[name], framework="pt") as file:
            return packed_archive.read_weight(file.get_tensor, name, self.packed[name])


def is_plain(quantization: Any) -> bool:
    """Whether a `quantization_config` announces no quantization: there is none, or compressed-tensors' of plain floats.

    llm-compressor writes the latter for a model that is only sparse, and stored without its sparse format.
    """
    if not quantization:
        return True
    if not isinstance(quantization, dict):
        return False
    unnamed = "compressed-tensors" if "sparsity_config" in quantization else None
    if quantization.get("quant_method", unnamed) != "compressed-tensors":
        return False
    sparsity = quantization.get("sparsity_config") or {}
    sparse_format = sparsity.get("format", "dense") if isinstance(sparsity, dict) else None
    return not quantization.get("config_groups") and sparse_format == "dense"


def is_buffer(name: str) -> bool:
    """Whether a tensor's name is that of a buffer that models compute themselves, whatever a file says."""
    return _BUFFERS.search(name) is not None


def _require_agreement(folder: Path, index: dict[str, str], headers: dict[Path, Header]) -> None:
    """Check that the shards hold exactly the tensors that the index names."""
    found = {(name, path.name) for path, header in headers.items() for name in header.layouts}
    misplaced = [
        f"{INDEX} says that {shard} holds {name}, and it does not" for name, shard in sorted(index.items() - found)
    ]
    unlisted = [
        f"{shard} holds {name}, which {INDEX} does not list there" for name, shard in sorted(found - index.items())
    ]
    if problems := [*misplaced, *unlisted]:
        raise SppError(
            f"{folder}: the shards and the index do not belong together, for {len(problems)} tensors; first of them: "
            f"{problems[0]}; copy or download the model again"
        )


def _index(path: Path) -> dict[str, str]:
    """Tensor name -> name of its shard, a file beside the index."""
    content = read_json(path)
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
        raise SppError(f"{path}: it has no weight_map of tensor names and file names; copy or download the model again")
    if outside := sorted(shard for shard in set(index.values()) if not _is_plain_name(shard)):
        raise SppError(
            f"{path}: it names {outside[0]!r}, and shards have to be .safetensors files in the folder itself; do not "
            "trust where this model came from"
        )
    return index


def _is_plain_name(name: str) -> bool:
    """Whether a name from a file can only be that of a weights file in the same folder, on any system."""
    return name.endswith(".safetensors") and not any(character in name for character in "/\\:\0")
