"""A sparse model and an adapter for it, as files, for tests of what is done with the two."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from spp.checkpoints.checkpoint import Checkpoint
from spp.checkpoints.json_files import write_json
from spp.patterns import NM


def sparse_model(folder: Path, tiny_model, *, dtype=torch.bfloat16, family="llama", **save) -> Path:
    model = tiny_model(family, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("proj" in name or "c_" in name):
                matrix = parameter.T if family == "gpt2" else parameter
                matrix.masked_fill_(~NM(2, 4).keep_mask(matrix.float().abs()), 0.0)
    model.save_pretrained(folder, **save)
    return folder


def adapter_for(
    folder: Path, base: Path, modules: list[str], *, scale: float = 2.0, rank: int = 4, size: float = 0.5
) -> Path:
    """Factors as the tuner saves them, for the named modules of a checkpoint."""
    folder.mkdir()
    checkpoint = Checkpoint.open(base)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for module in modules:
        out_features, in_features = checkpoint.shape(f"{module}.weight")
        if checkpoint.transposed(f"{module}.weight"):
            out_features, in_features = in_features, out_features
        key = f"base_model.model.{module}"
        tensors[f"{key}.spp_A.weight"] = torch.randn(rank, in_features, generator=generator) * size
        tensors[f"{key}.spp_B.weight"] = torch.randn(out_features, 1, generator=generator) * size
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"peft_type": "SPP", "r": rank, "scale": scale})
    return folder
