"""The quantized matrices of finished blocks, in files of unfinished work, until the archive is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from spp.checkpoints.fingerprint import file_digest
from spp.checkpoints.json_files import sync
from spp.checkpoints.pack import PackWeight
from spp.checkpoints.safetensors_file import save_tensors
from spp.checkpoints.unfinished import DamagedWork, going_on_from
from spp.errors import SppError
from spp.models.blockwise.journal import Journal
from spp.ops.few_bits import TENSORS, FewBitWeight
from spp.ops.packed import mask_of_bits
from spp.pruning.few_bits.quantize import Quantized
from spp.pruning.quantize_blocks import WALK


class QuantizedFiles:
    """Takes quantized matrices block by block, and gives them to the archive by name.

    Args:
        work: folder for the files.
        journal: records the files of finished blocks.
        parameters: full name of a parameter -> the name of its tensor in the model's files.
    """

    def __init__(self, work: Path, journal: Journal, parameters: Mapping[str, str]) -> None:
        self._work, self._journal, self.parameters = work, journal, parameters

    def write(self, index: int, quantized: Mapping[str, Quantized]) -> dict[str, Any]:
        """Write the matrices of a block, by name of the parameter; returns what has to be known of its file."""
        path = self._work / f"quantized-{index}.safetensors"
        path.unlink(missing_ok=True)  # whatever a killed run or a damage has left there
        names = {name: self.parameters[name] for name in quantized}
        save_tensors(
            path,
            {
                f"{names[name]}.{part}": tensor.cpu()
                for name, matrix in quantized.items()
                for part, tensor in matrix.packed().tensors().items()
            },
        )
        sync(path)
        return {"file": path.name, "sha256": file_digest(path), "names": list(names.values())}

    def packing(self, others: PackWeight, bits: int, group: int) -> PackWeight:
        """Packs the weights that were quantized, and all others as `others` does.

        Raises:
            DamagedWork: a file is not as it was written.
        """
        places: dict[str, Path] = {}
        for block in self._journal.results(WALK):
            file = block["finished"]
            path = self._work / file["file"]
            with going_on_from(path):
                if file_digest(path) != file["sha256"]:
                    raise DamagedWork(f"{path} is not as it was written")
            places |= dict.fromkeys(file["names"], path)

        def pack_weight(name: str, weight: Tensor) -> Any:
            if name not in places:
                return others(name, weight)
            with safe_open(places[name], framework="pt") as file:
                tensors = {part: file.get_tensor(f"{name}.{part}") for part in TENSORS}
            found = FewBitWeight.from_tensors(tensors, weight.shape[1], bits, group, name)
            if not mask_of_bits(found.bitmask, found.in_features).equal(weight != 0):
                raise SppError(f"{name}: some weights became zero when they were computed with; pass --dtype float32")
            return found

        return pack_weight
