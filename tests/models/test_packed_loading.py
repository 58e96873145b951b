"""Loading with packing: each layer is packed as it is read, from plain safetensors or an archive."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import spp
from spp.checkpoints.checkpoint import Checkpoint
from spp.checkpoints.options import PackOptions
from spp.errors import SppError, UsageError
from spp.models.architecture import prunable_linears
from spp.models.few_bit_linear import FewBitLinear
from spp.models.loading import load_base, load_model
from spp.models.packed_linear import PackedLinear
from spp.options import LoadingOptions
from spp.pruning.pack import pack

ON_CPU = LoadingOptions(device="cpu")


@pytest.fixture
def sparse_folder(tmp_path, tiny_model):
    """A function that saves a sparse tiny model, in shards if asked."""

    def make(family="llama", **saving):
        model = tiny_model(family, dtype=torch.bfloat16)
        for layer in prunable_linears(model).values():
            layer.weight.data[:, ::2] = 0
        folder = tmp_path / family
        model.save_pretrained(folder, **saving)
        return folder

    return make


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(40).view(2, 20)).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, "auto"])
@pytest.mark.parametrize("from_archive", [False, True])
def test_the_packed_model_is_the_dense_one(sparse_folder, tmp_path, family, dtype, from_archive):
    folder = sparse_folder(family, max_shard_size="30KB")
    dense = load_model(folder, ON_CPU, dtype=dtype)
    if from_archive:
        pack(PackOptions(model=str(folder), out=tmp_path / "archive"))
    packed = load_model(tmp_path / "archive" if from_archive else folder, ON_CPU, dtype=dtype, pack=not from_archive)
    layers = prunable_linears(packed).values()
    assert all(isinstance(layer, PackedLinear) and layer.values.dtype == torch.bfloat16 for layer in layers)
    assert packed.dtype == dense.dtype and not packed.training
    torch.testing.assert_close(logits(packed), logits(dense))
    assert not hasattr(packed.config, "quantization_config") and not getattr(packed, "is_quantized", False)
    assert packed.generation_config.to_dict() == dense.generation_config.to_dict()
    spp.unpack_(packed)
    for name, tensor in dense.state_dict().items():
        assert packed.state_dict()[name].to(tensor.dtype).equal(tensor), name


def test_layers_that_are_not_sparse_stay_dense(sparse_folder):
    folder = sparse_folder()
    model = load_model(folder, ON_CPU)
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1.0)
    model.to(torch.bfloat16).save_pretrained(folder)
    packed = load_model(folder, ON_CPU, pack=True)
    assert type(packed.model.layers[1].mlp.up_proj) is nn.Linear
    assert type(packed.model.layers[0].mlp.up_proj) is PackedLinear


def test_values_that_bf16_cannot_hold_keep_their_dtype(sparse_folder):
    folder = sparse_folder()
    model = load_model(folder, ON_CPU, dtype=torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data *= 1 + 2**-20
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    packed = load_model(folder, ON_CPU, dtype=torch.float32, pack=True)
    assert packed.model.layers[0].mlp.up_proj.values.dtype == torch.float32
    assert packed.model.layers[0].mlp.up_proj.weight.equal(layer.weight)


@pytest.mark.parametrize("pack_it", [False, True])
def test_a_config_of_another_model_is_named(sparse_folder, pack_it):
    folder = sparse_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    with pytest.raises(SppError, match=r"\(96, 32\).*\(50, 32\)"):
        load_model(folder, ON_CPU, pack=pack_it)


def test_packing_on_request_only_or_where_it_is_fast(sparse_folder, tiny_model, tmp_path):
    folder = sparse_folder()
    cpu = torch.device("cpu")

    def packed(**choice):
        model = load_base(folder, ON_CPU, dtype="auto", on=cpu, **choice)
        return any(isinstance(module, PackedLinear) for module in model.modules())

    assert packed(pack=True) and not packed(pack=False)
    assert packed(pack=None) == (spp.ops.native.instructions() is not None)
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match="Prune it first"):
        load_base(tmp_path / "dense", ON_CPU, dtype="auto", on=cpu, pack=True)


MEASURE = """
import sys, torch
from pathlib import Path
from spp.models.loading import load_model
from spp.runtime.memory import peak_rss_bytes
from spp.options import LoadingOptions
import transformers.models.llama.modeling_llama, spp.models.packed_loading
before = peak_rss_bytes()
model = load_model(Path(sys.argv[1]), LoadingOptions(device="cpu", dtype="bfloat16"), pack=sys.argv[2] == "packed")
with torch.no_grad():
    model(torch.zeros(1, 3, dtype=torch.int64))  # touches what was only mapped
print(peak_rss_bytes() - before)
"""


def test_peak_memory_never_sees_the_dense_model(tmp_path, tiny_model):
    """50 million weights, three quarters of them zero: 100 MB dense, 32 MB packed, 4 MB for the tensor being read."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 96}
    model = tiny_model("llama", dtype=torch.bfloat16, num_attention_heads=8, num_key_value_heads=8, **sizes)
    dense = 0
    for layer in prunable_linears(model).values():
        layer.weight.data[torch.rand(layer.weight.shape) < 0.75] = 0
        dense += layer.weight.nbytes
    model.save_pretrained(tmp_path / "model")

    def measured(how):
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    assert dense > 100e6
    assert measured("dense") > 0.8 * dense
    assert measured("packed") < 0.7 * dense


def test_an_archive_is_not_mistaken_for_a_dense_model(sparse_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    pack(PackOptions(model=str(sparse_folder()), out=tmp_path / "archive"))
    with pytest.raises(OSError, match=r"no file named|does not appear to have"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "archive")
    assert Checkpoint.open(tmp_path / "archive").packed


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_survivors_in_few_bits_stay_so_to_generate_and_are_expanded_to_train(sparse_folder, tmp_path, family):
    folder, archive = sparse_folder(family), tmp_path / "archive"
    pack(PackOptions.build({"model": str(folder), "out": archive, "bits": 4}))
    few = load_base(archive, ON_CPU, dtype=torch.float32, pack=None, on=torch.device("cpu"), few_bits=True)
    packed = Checkpoint.open(archive).packed
    layers = {name: module for name, module in few.named_modules() if isinstance(module, FewBitLinear)}
    assert {f"{name}.weight" for name in layers} == set(packed)
    for name, layer in layers.items():
        x = torch.randn(8, layer.in_features)
        assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
        stored = Checkpoint.open(archive).tensor(f"{name}.weight")
        assert layer.weight.to(stored.dtype).equal(stored.T if packed[f"{name}.weight"].transposed else stored)
        assert torch.allclose(layer(x[0]), nn.functional.linear(x[0], layer.weight, layer.bias), atol=0.05)
    for options in ({"few_bits": False}, {"few_bits": True, "pack": False}):
        loading = {"dtype": torch.float32, "pack": None, "on": torch.device("cpu"), **options}
        other = load_base(archive, ON_CPU, **loading)
        assert not any(isinstance(module, FewBitLinear) for module in other.modules())
        ids = torch.arange(4, 20)[None]
        with torch.no_grad():
            assert torch.allclose(few(ids).logits, other(ids).logits, atol=0.05)


def test_a_damaged_weight_in_few_bits_is_named(sparse_folder, tmp_path):
    archive = tmp_path / "archive"
    pack(PackOptions.build({"model": str(sparse_folder()), "out": archive, "bits": 4}))
    name = next(iter(Checkpoint.open(archive).packed))
    path = Checkpoint.open(archive).files[name]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    changed = load_file(path)
    changed[f"{name}.codebook"][2] = 0
    save_file(changed, path, metadata)
    with pytest.raises(SppError, match=f"{name}: .*the codebook has a zero"):
        load_base(archive, ON_CPU, dtype=torch.float32, pack=None, on=torch.device("cpu"), few_bits=True)
