"""Other people's tools take what we write. Those that must be installed by hand are found by environment variables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from spp import SppConfig
from spp.adapters.merge import merge
from spp.adapters.options import MergeOptions
from spp.checkpoints.checkpoint import Checkpoint
from spp.patterns import NM
from spp.pruning.options import PruneOptions
from spp.pruning.prune import prune

LLAMA_CPP = "SPP_LLAMA_CPP"
"""Folder of a llama.cpp checkout, with convert_hf_to_gguf.py and gguf-py in it."""

# llama.cpp's names of the projections whose rows it leaves in order; those of q and k it interleaves for its RoPE.
IN_ORDER = {
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    if LLAMA_CPP not in os.environ:
        pytest.skip(f"needs {LLAMA_CPP}=FOLDER, a llama.cpp checkout whose converter's requirements are installed")
    folder = Path(os.environ[LLAMA_CPP])
    assert (folder / "convert_hf_to_gguf.py").is_file(), f"{LLAMA_CPP}={folder} holds no convert_hf_to_gguf.py"
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A real small Llama with its tokenizer, pruned to 2:4, with random factors merged into it."""
    folder = tmp_path_factory.mktemp("merged")
    model, pruned, adapter, out = (folder / name for name in ("model", "pruned", "adapter", "out"))
    model.symlink_to(shared_data / "models" / "stories260K")
    prune(PruneOptions.build({"model": str(model), "out": pruned, "criterion": "magnitude", "pattern": "2:4"}))
    torch.manual_seed(0)
    config = SppConfig(r=4, scale=0.25, init_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(pruned), config).save_pretrained(str(adapter))
    merge(MergeOptions(model=str(pruned), adapter=adapter, out=out))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_llama_cpp_keeps_every_zero(
    tmp_path: Path, merged: Path, llama_cpp: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / f"{kind}.gguf"
    script = llama_cpp / "convert_hf_to_gguf.py"
    command = [sys.executable, script, merged, "--outfile", out, "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = read_gguf(out, llama_cpp, monkeypatch)
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    checkpoint, compared = Checkpoint.open(merged), 0
    for name, tensor in found.items():
        block, _, what = name.removeprefix("blk.").removesuffix(".weight").partition(".")
        if what in IN_ORDER:
            stored = checkpoint.tensor(f"model.layers.{block}.{IN_ORDER[what]}.weight")
            assert tensor.equal(stored.to(dtype).float()), name
        elif what in ("attn_q", "attn_k"):
            stored = checkpoint.tensor(f"model.layers.{block}.self_attn.{what[-1]}_proj.weight")
            rows, expected = (sorted(one.tolist()) for one in (tensor, stored.to(dtype).float()))
            assert rows == expected, name
        else:
            continue
        compared += 1
        assert NM(2, 4).violations(tensor) == 0, name
        assert not tensor[tensor == 0].signbit().any(), name
    assert compared == 7 * checkpoint.config["num_hidden_layers"]


def read_gguf(path: Path, llama_cpp: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The tensors of a GGUF file in fp32, read by llama.cpp's own library."""
    monkeypatch.syspath_prepend(str(llama_cpp / "gguf-py"))
    from gguf import GGUFReader, dequantize  # pyright: ignore[reportMissingImports]

    return {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in GGUFReader(path).tensors
    }
