"""2:4 for sparse tensor cores: which layers are taken, what is refused, and on a GPU the numbers."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import spp
from spp.errors import UsageError
from spp.models.semi_structured import to_semi_structured, unsuitable
from spp.patterns import NM


def linear(out_features: int, in_features: int, *, sparse: bool = True, dtype=torch.bfloat16) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, dtype=dtype)
    if sparse:
        with torch.no_grad():
            layer.weight.masked_fill_(~NM(2, 4).keep_mask(layer.weight.float().abs()), 0.0)
    return layer


def test_layers_are_taken_or_left_with_a_reason():
    almost = linear(32, 64)
    with torch.no_grad():
        almost.weight[3, 4:7] = 1.0
    tied = linear(64, 64)
    embedding = nn.Embedding(64, 64, dtype=torch.bfloat16)
    embedding.weight = tied.weight
    model = nn.ModuleDict(
        {
            "good": linear(96, 128),
            "fp16": linear(32, 64, dtype=torch.float16),
            "dense": linear(32, 64, sparse=False),
            "almost": almost,
            "narrow": linear(40, 64),
            "short": linear(32, 96),
            "wide": linear(32, 64, dtype=torch.float32),
            "conv": Conv1D(32, 64),
            "embedding": embedding,
            "head": tied,
        }
    )
    found = unsuitable(model)
    assert set(model) - set(found) == {"good", "fp16", "embedding"}  # the embedding is no linear layer
    assert found["almost"] == "is not 2:4: 1 groups of 4 have more than 2 non-zeros"
    assert "more than 2" in found["dense"]
    assert "(40, 64)" in found["narrow"] and "(32, 96)" in found["short"]
    assert "float32" in found["wide"] and "Conv1D" in found["conv"] and "shares" in found["head"]


def test_packed_and_adapted_layers_are_left(tiny_model):
    model = tiny_model("llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.masked_fill_(~NM(2, 4).keep_mask(parameter.float().abs()), 0.0)
    assert set(unsuitable(model)) >= {"lm_head"}
    adapted = get_peft_model(model, spp.SppConfig(target_modules=["q_proj"]))
    why = unsuitable(adapted)
    assert why["base_model.model.model.layers.0.self_attn.q_proj.base_layer"] == "has an adapter; merge it first"
    with pytest.raises(UsageError, match=r"q_proj, for one, is packed; call spp.unpack_ first"):
        unsuitable(spp.pack_(adapted.unload()))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(linear(32, 64, dtype=torch.float32)), r"0, for one, is float32.*model\.to\(torch\.bfloat16\)"),
        (nn.Sequential(linear(32, 64, sparse=False)), "0, for one, is not 2:4"),
        (nn.Sequential(nn.ReLU()), "because it has none"),
    ],
    ids=["dtype", "dense", "no layer"],
)
def test_a_model_without_any_such_layer_is_refused(model, message):
    with pytest.raises(UsageError, match=message):
        unsuitable(model)


def test_without_cuda_it_says_what_is_needed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = nn.Sequential(linear(32, 64))
    before = model[0].weight
    with pytest.raises(UsageError, match="compute capability 8.0 or above, and torch sees no CUDA device here"):
        spp.to_semi_structured(model)
    assert model[0].weight is before


def test_a_model_on_the_cpu_is_told_to_move(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match=r'parameters on cpu; call model\.to\("cuda"\) first'):
        to_semi_structured(nn.Sequential(linear(32, 64)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_the_products_are_those_of_the_dense_layer(dtype, tokens):
    torch.manual_seed(0)
    model = nn.Sequential(linear(256, 128, dtype=dtype), nn.GELU(), linear(128, 256, sparse=False, dtype=dtype)).cuda()
    x = torch.randn(2, tokens, 128, dtype=dtype, device="cuda")
    weight = model[0].weight.detach().clone()
    with torch.no_grad():
        expected = model(x)
        report = to_semi_structured(model)
        found = model(x)
    assert report.converted == ["0"] and "more than 2" in report.skipped["2"]
    assert isinstance(model[0].weight, torch.sparse.SparseSemiStructuredTensor)
    assert model[0].weight.to_dense().equal(weight)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
