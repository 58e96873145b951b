"""Packing a model in place: same results, less memory, and back again with the same bits."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import spp
from spp.checkpoints.json_files import read_json
from spp.errors import SppError, UsageError
from spp.models.architecture import prunable_linears, sparsity
from spp.models.pack_model import pack_, packed_layer, unpack_
from spp.models.packed_linear import PackedLinear


@pytest.fixture
def sparse(tiny_model):
    """A function that makes a tiny model with half of its weights zero."""

    def make(family="llama", dtype=torch.bfloat16):
        model = tiny_model(family, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        for layer in prunable_linears(model).values():
            keep = torch.rand(layer.weight.shape, generator=generator) < 0.5
            layer.weight.data = torch.where(keep, layer.weight.data, 0)
        return model

    return make


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(40).view(2, 20)).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_packed_model_computes_the_same_and_unpacks_to_the_same_bits(sparse, family, dtype):
    model = sparse(family, dtype)
    before = copy.deepcopy(model.state_dict())
    dense = logits(model)
    spp.pack_(model)
    layers = prunable_linears(model)
    assert layers and all(isinstance(layer, PackedLinear) for layer in layers.values())
    assert 0.45 < sparsity(layers.values()) < 0.55
    torch.testing.assert_close(logits(model), dense)
    spp.unpack_(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[name].equal(before[name]) for name in before)
    assert logits(model).equal(dense)


def test_dense_weights_are_freed_one_by_one(sparse, monkeypatch):
    model = sparse()
    alive = [weakref.ref(layer.weight) for layer in prunable_linears(model).values()]
    most = []

    def counting(module):
        gc.collect()
        most.append(sum(ref() is not None for ref in alive))
        return packed_layer(module)

    monkeypatch.setattr("spp.models.pack_model.packed_layer", counting)
    pack_(model)
    assert most == list(range(len(alive), 0, -1))


def test_a_layer_that_is_not_sparse_stays_and_a_dense_model_is_refused(tiny_model, sparse):
    model = sparse()
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
    pack_(model)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    with pytest.raises(UsageError, match="no linear layer of this LlamaForCausalLM has 30% zeros"):
        pack_(tiny_model("llama"))


def test_a_packed_model_can_be_moved_and_cast(sparse):
    model = pack_(sparse(dtype=torch.float32))
    expected = logits(unpack_(copy.deepcopy(model)).bfloat16())
    model.to(torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.values.dtype == torch.bfloat16 and layer.bitmask.dtype == torch.int32
    assert logits(model).equal(expected)
    assert all(tensor.device.type == "meta" for tensor in copy.deepcopy(layer).to("meta").parameters())


def test_a_state_dict_loads_into_a_model_with_other_zeros(sparse):
    model, other = pack_(sparse()), sparse()
    for layer in prunable_linears(other).values():
        layer.weight.data[:, ::3] = 0
    pack_(other)
    model.load_state_dict(other.state_dict())
    assert logits(model).equal(logits(other))


def test_loading_a_damaged_state_is_refused(sparse):
    model = pack_(sparse())
    state = model.state_dict()
    name = "model.layers.0.mlp.up_proj.bitmask"
    state[name] = torch.full_like(state[name], -1)
    with pytest.raises(RuntimeError, match=r"up_proj\.: \d+ rows have another number of bits"):
        model.load_state_dict(state)


def test_set_weight_keeps_the_zeros(sparse):
    layer = pack_(sparse()).model.layers[0].mlp.up_proj
    layer.set_weight(2 * layer.weight)
    with pytest.raises(SppError, match="are not zero where the packed weight is"):
        layer.set_weight(layer.weight + 1)


def test_no_gradient_for_what_is_packed_and_a_bias_may_train(sparse):
    model = sparse("gpt2", torch.float32)
    pack_(model)
    layer = model.transformer.h[0].mlp.c_fc
    x = torch.randn(7, 32, requires_grad=True)
    dense = torch.nn.functional.linear(x, layer.weight.T, layer.bias)
    expected = torch.autograd.grad(dense.square().sum(), (x, layer.bias))
    found = torch.autograd.grad(layer(x).square().sum(), (x, layer.bias))
    torch.testing.assert_close(found, expected)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 64, 65, 128, 129, 513])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_every_path_of_the_product_gives_the_dense_result(tokens, bias, dtype, tolerance):
    """Few tokens, a few times as many, and one GEMM; a number of columns that fits no word."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layer = nn.Linear(45, 1100, bias=bias, dtype=dtype)
    layer.weight.data *= torch.rand(1100, 45, generator=generator) < 0.3
    x = torch.randn(2, tokens, 45, generator=generator)[:1].to(dtype)
    torch.testing.assert_close(packed_layer(layer)(x), layer(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["fused", "split"])
def test_spp_trains_on_packed_layers_to_the_same_bits(sparse, family, mode, tmp_path):
    """Adapters on packed layers: the same loss, gradients and logits to the bit; saved, loaded, merged and unmerged."""
    results = []
    for packed in (False, True):
        model = sparse(family)
        if packed:
            pack_(model)
        torch.manual_seed(1)
        adapted = get_peft_model(model, spp.SppConfig(r=4, mode=mode, init_weights=False, task_type="CAUSAL_LM"))
        ids = torch.arange(40).view(2, 20)
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
        tuned = logits(adapted)
        adapted.save_pretrained(tmp_path / str(packed))
        adapted.merge_adapter()
        merged = logits(adapted)
        adapted.unmerge_adapter()
        assert logits(adapted).equal(tuned)
        results.append((loss, grads, tuned, merged))
        whole = adapted.merge_and_unload()
        assert any(isinstance(m, PackedLinear) for m in whole.modules()) == packed
        torch.testing.assert_close(logits(whole), merged)
    (loss_a, grads_a, tuned_a, merged_a), (loss_b, grads_b, tuned_b, merged_b) = results
    tolerance = {} if family == "llama" else {"rtol": 0.05, "atol": 0.02}  # Conv1D multiplies in another order
    assert grads_a.keys() == grads_b.keys() and len(grads_a) > 4
    torch.testing.assert_close(loss_a, loss_b, **tolerance)
    if family == "llama":
        assert all(grads_a[name].equal(grads_b[name]) for name in grads_a)
        assert tuned_a.equal(tuned_b)
    torch.testing.assert_close(merged_a, merged_b, **tolerance)
    reloaded = PeftModel.from_pretrained(pack_(sparse(family)), tmp_path / "False")
    torch.testing.assert_close(logits(reloaded), tuned_b, **tolerance)


def test_merging_on_packed_values_keeps_the_mask(sparse):
    model = pack_(sparse())
    adapted = get_peft_model(model, spp.SppConfig(r=4, init_weights=False, task_type="CAUSAL_LM"))
    layer = model.model.layers[0].mlp.up_proj.base_layer
    before, mask = layer.weight, layer.bitmask.clone()
    adapted.merge_adapter()
    assert layer.bitmask.equal(mask)
    assert not layer.weight.equal(before)
    assert not layer.weight[before == 0].any()


def test_all_linear_and_second_adapters_find_packed_layers(sparse):
    adapted = get_peft_model(pack_(sparse()), spp.SppConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.add_adapter("other", spp.SppConfig(r=2, task_type="CAUSAL_LM"))
    wrapped = [m for m in adapted.modules() if type(m).__name__ == "SppLinear"]
    assert len(wrapped) == 14 and all(set(m.r) == {"default", "other"} for m in wrapped)


def saved_like(model, folder):
    """What stock transformers reads from what a model saves, and what it says of the read."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.bfloat16)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi"])
def test_a_packed_model_saves_a_checkpoint_that_loads_everywhere(sparse, family, tmp_path):
    model = sparse(family)
    before = copy.deepcopy(model.state_dict())
    loaded, info = saved_like(spp.pack_(model), tmp_path / "packed")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert read_json(tmp_path / "packed" / "config.json")["architectures"] == [type(model).__name__]
    assert all(loaded.state_dict()[name].equal(before[name]) for name in before)
    assert isinstance(prunable_linears(model).popitem()[1], PackedLinear)  # saving changes nothing


def test_a_state_dict_that_is_given_is_saved_dense_too(sparse, tmp_path):
    model = spp.pack_(sparse())
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "given", dtype=torch.bfloat16)
    expected = spp.unpack_(model).state_dict()
    assert all(loaded.state_dict()[name].equal(expected[name]) for name in expected)


def test_a_model_whose_adapter_was_merged_while_it_was_packed_saves_dense(sparse, tmp_path):
    model = spp.pack_(sparse())
    adapted = get_peft_model(model, spp.SppConfig(r=4, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "spp_A" in name:
            parameter.data.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
    merged = adapted.merge_and_unload()
    loaded, info = saved_like(merged, tmp_path / "merged")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = spp.unpack_(merged).state_dict()
    assert all(loaded.state_dict()[name].equal(expected[name]) for name in expected)


def test_copies_and_unpacked_models_save_themselves(sparse, tmp_path):
    model = spp.pack_(sparse())
    kind = type(sparse())
    assert isinstance(model, kind)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    loaded, _ = saved_like(twin, tmp_path / "twin")
    assert not loaded.lm_head.weight.any()
    assert type(spp.unpack_(model)) is kind
