"""Architecture knowledge: which weights of each family are pruned, and which stay dense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import TINY_CONFIGS
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from spp.errors import UsageError
from spp.models import decoder_blocks, is_transposed, prunable_linears, unreached_weights, weight_oi

MakeModel = Callable[..., PreTrainedModel]

BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}
SWIGLU = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip
LINEARS = dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma"], SWIGLU) | {
    "phi": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"],
    "opt": ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "gpt_neox": ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
}


def causal_model(family: str, **changes: object) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **(TINY_CONFIGS["llama"] | changes))
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_finds_the_linear_layers_of_every_block(tiny_model: MakeModel, family: str) -> None:
    model = tiny_model(family, **({"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}))
    prefix, blocks = decoder_blocks(model)
    assert prefix == BLOCKS.get(family, "model.layers")
    assert len(blocks) == 3
    assert all(block is model.get_submodule(f"{prefix}.{index}") for index, block in enumerate(blocks))
    linears = prunable_linears(model)
    assert sorted(linears) == sorted(f"{prefix}.{index}.{name}" for index in range(3) for name in LINEARS[family])
    assert all(module is model.get_submodule(name) for name, module in linears.items())
    assert not unreached_weights(model)


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_what_is_left_is_embeddings_head_norms_and_biases(tiny_model: MakeModel, family: str) -> None:
    model = tiny_model(family)
    pruned = {id(module.get_parameter("weight")) for module in prunable_linears(model).values()}
    rest = [name for name, parameter in model.named_parameters() if parameter.ndim > 1 and id(parameter) not in pruned]
    allowed = ("embed", "wte", "wpe", "lm_head")
    assert all(any(word in name for word in allowed) for name in rest), rest


def test_projections_around_the_blocks_of_opt_stay_dense(tiny_model: MakeModel) -> None:
    model = tiny_model("opt", word_embed_proj_dim=16)
    assert model.get_submodule("model.decoder.project_in")
    assert not [name for name in prunable_linears(model) if "project" in name]


def test_the_weight_view_is_output_by_input_and_writes_through(tiny_model: MakeModel) -> None:
    model = tiny_model("gpt2")
    module = prunable_linears(model)["transformer.h.0.mlp.c_fc"]
    assert isinstance(module, Conv1D)
    assert is_transposed(module)
    view = weight_oi(module)
    assert view.shape == (128, 32)
    view[5, 7] = 42
    assert module.weight[7, 5] == 42
    assert not view.requires_grad

    linear = nn.Linear(3, 5)
    assert not is_transposed(linear)
    assert weight_oi(linear).shape == (5, 3)


def test_experts_do_not_hide_the_blocks() -> None:
    """As many experts as layers: the list of experts is inside a block, so it is not mistaken for the blocks."""
    model = causal_model("llama", num_hidden_layers=2)
    for block in decoder_blocks(model)[1]:
        block.mlp.experts = nn.ModuleList([nn.Linear(32, 32, bias=False) for _ in range(2)])
    assert decoder_blocks(model)[0] == "model.layers"
    assert "model.layers.1.mlp.experts.0" in prunable_linears(model)


def test_stacked_experts_are_named() -> None:
    model = causal_model("mixtral", num_local_experts=3)
    names = unreached_weights(model)
    assert names
    assert all(".experts." in name for name in names)
    assert "model.layers.0.self_attn.q_proj" in prunable_linears(model)


def test_refuses_an_encoder_decoder() -> None:
    config = AutoConfig.for_model("t5", d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=32)
    with pytest.raises(UsageError, match="T5ForConditionalGeneration is not a decoder-only causal"):
        decoder_blocks(AutoModelForSeq2SeqLM.from_config(config))


def test_refuses_a_model_without_a_language_model_head() -> None:
    config = AutoConfig.for_model("llama", **TINY_CONFIGS["llama"])
    with pytest.raises(UsageError, match="LlamaModel is not"):
        prunable_linears(AutoModel.from_config(config))
    with pytest.raises(UsageError, match="LlamaForSequenceClassification is not"):
        decoder_blocks(AutoModelForSequenceClassification.from_config(config))


def test_refuses_anything_else() -> None:
    with pytest.raises(UsageError, match="Linear is not"):
        decoder_blocks(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_says_what_it_saw_where_blocks_cannot_be_told(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(UsageError, match=r"num_hidden_layers = 7 entries.*\[2\]"):
        decoder_blocks(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_refuses_quantised_weights(tiny_model: MakeModel, dtype: torch.dtype) -> None:
    model = tiny_model("llama")
    module = model.get_submodule("model.layers.1.mlp.up_proj")
    module.weight = nn.Parameter(torch.zeros(48, 32).to(dtype), requires_grad=False)
    with pytest.raises(UsageError, match="model.layers.1.mlp.up_proj: the weight is quantised"):
        prunable_linears(model)
