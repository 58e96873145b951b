"""The operator under torch.compile (full graph), activation checkpointing and FSDP2; and without the native library."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from spp.ops import autograd, native, pack, spp_linear
from spp.ops.packed import PackedWeight


def example(packed):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator) * (torch.rand(96, 64, generator=generator) < 0.5)
    x, A, B = (torch.randn(shape, generator=generator, requires_grad=True) for shape in ((2, 5, 64), (4, 64), (96, 1)))
    return x, pack(weight) if packed else weight, A, B


def gradients(function, x, A, B):
    y = function(x, A, B)
    return (y, *torch.autograd.grad(y.square().sum(), (x, A, B)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["fused", "split"])
def test_a_full_graph_saves_nothing_of_the_weights_size(packed, mode):
    """The compiler must not merge the two formations of W' into one that it keeps until backward."""
    x, weight, A, B = example(packed)

    def layer(x, A, B):
        return torch.nn.functional.silu(spp_linear(x, weight, A, B, 1.5, mode=mode)) * 2

    expected = gradients(layer, x, A, B)
    saved = []

    def pack_hook(tensor):
        saved.append(tensor)
        return tensor

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        y = compiled(x, A, B)
    grads = torch.autograd.grad(y.square().sum(), (x, A, B))
    for ours, theirs in zip((y, *grads), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    held = [weight] if not isinstance(weight, PackedWeight) else autograd.as_tensors(weight)
    own = {tensor.data_ptr() for tensor in held}
    assert not [tensor.shape for tensor in saved if tensor.numel() >= 96 * 64 and tensor.data_ptr() not in own]


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_inductor_gives_the_same_gradients(packed):
    x, weight, A, B = example(packed)

    def layer(x, A, B):
        return torch.nn.functional.silu(spp_linear(x, weight, A, B, 1.5))

    for ours, theirs in zip(
        gradients(torch.compile(layer, fullgraph=True), x, A, B), gradients(layer, x, A, B), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(packed, reentrant):
    x, weight, A, B = example(packed)

    def layer(x, A, B):
        return spp_linear(x, weight, A, B, 1.5)

    def checkpointed(x, A, B):
        return checkpoint(layer, x, A, B, use_reentrant=reentrant)

    expected = gradients(layer, x, A, B)[1:]
    checkpointed(x, A, B).square().sum().backward()  # re-entrant checkpointing knows no `autograd.grad`
    for tensor, theirs in zip((x, A, B), expected, strict=True):
        assert tensor.grad.equal(theirs)


@pytest.mark.parametrize("packed", [False, True])
def test_the_ops_pass_torchs_own_checks(packed):
    x, weight, A, B = example(packed)
    arguments = (
        x.detach().reshape(-1, 64).requires_grad_(),
        autograd.as_tensors(weight),
        A,
        B,
        1.5,
        None,
        "fused",
        "torch",
    )
    torch.library.opcheck(autograd._linear_op, arguments)


FSDP = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM
import spp
from spp.models.architecture import prunable_linears

dist.init_process_group("gloo")
rank = dist.get_rank()

def made(packed):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, vocab_size=96)
    model = AutoModelForCausalLM.from_config(config)
    for layer in prunable_linears(model).values():
        layer.weight.data[:, ::2] = 0
    if packed:
        spp.pack_(model)
    return get_peft_model(model, spp.SppConfig(r=4, init_weights=False, task_type="CAUSAL_LM"))

def losses(model, ids):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    found = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return found

ids = torch.arange(40).view(2, 20)
packed = sys.argv[1] == "packed"
alone = losses(made(packed), ids)
model = made(packed)
mesh = init_device_mesh("cpu", (2,))
for block in model.base_model.model.model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
sharded = losses(model, ids)
assert max(abs(a - b) for a, b in zip(alone, sharded)) < 1e-5, (alone, sharded)
assert alone[-1] < alone[0]
dist.barrier()
os._exit(0)  # gloo's threads sometimes abort an ordinary exit
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dense", "packed"])
def test_fsdp2_gives_the_losses_of_one_process(tmp_path, how):
    script = tmp_path / "fsdp.py"
    script.write_text(FSDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script), how]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_the_library_everything_still_works(monkeypatch):
    monkeypatch.setattr(native, "_LIBRARY", None)
    monkeypatch.setattr(native, "why_not_loaded", "it was not built when spp was installed")
    x, weight, A, B = example(packed=True)
    dense = example(packed=False)[1]
    y = spp_linear(x, weight, A, B, 1.5)
    torch.testing.assert_close(y, spp_linear(x, dense, A, B, 1.5, backend="reference"))
    with pytest.raises(ValueError, match="native cannot be used: it was not built"):
        spp_linear(x, dense, A, B, 1.5, backend="native")
