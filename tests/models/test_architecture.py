"""Architecture knowledge: which weights of each family are pruned, and which stay dense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import TINY_CONFIGS
from families import FAMILIES, tiny_model_of
from family_table import row_of, rows, skip_if_unknown
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
from spp.models.architecture import (
    Matrix,
    auto_class,
    decoder_blocks,
    is_transposed,
    prunable_linears,
    prunable_matrices,
    unreached_weights,
    weight_oi,
)
from spp.models.experts import stacks_in
from spp.models.pack_model import pack_

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


def matrices_of(model: PreTrainedModel) -> dict[str, Matrix]:
    """All prunable matrices of a model, by name."""
    prefix, blocks = decoder_blocks(model)
    matrices = [one for index, block in enumerate(blocks) for one in prunable_matrices(f"{prefix}.{index}", block)]
    assert len({matrix.name for matrix in matrices}) == len(matrices)
    return {matrix.name: matrix for matrix in matrices}


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_the_matrices_of_a_dense_model_are_its_linear_layers(tiny_model: MakeModel, family: str) -> None:
    model = tiny_model(family)
    matrices, linears = matrices_of(model), prunable_linears(model)
    assert list(matrices) == list(linears)
    for name, matrix in matrices.items():
        assert (matrix.owner, matrix.parameter, matrix.expert) == (linears[name], "weight", None)
        assert matrix.weight.equal(weight_oi(linears[name]))
        assert matrix.weight.data_ptr() == weight_oi(linears[name]).data_ptr()
        assert not matrix.weight.requires_grad


def test_the_matrices_of_experts_are_parts_of_their_stacks() -> None:
    model = tiny_model_of("mixtral")
    matrices = matrices_of(model)
    experts = model.get_submodule("model.layers.1.mlp.experts")
    gate_up, down = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
    for index in range(4):
        name = f"model.layers.1.mlp.experts.{index}"
        gate, up = matrices[f"{name}.gate_proj"], matrices[f"{name}.up_proj"]
        assert gate.weight.equal(gate_up[index, :48])
        assert up.weight.equal(gate_up[index, 48:])
        assert matrices[f"{name}.down_proj"].weight.equal(down[index])
        assert (gate.owner, gate.parameter, gate.expert) == (experts, "gate_up_proj", index)
        assert (up.owner, up.parameter, up.expert) == (experts, "gate_up_proj", index)
    matrices["model.layers.1.mlp.experts.2.up_proj"].weight[5, 7] = 42
    assert gate_up[2, 48 + 5, 7] == 42
    assert len(matrices) == 2 * (4 + 4 * 3)


def test_experts_without_gates_have_two_matrices_each() -> None:
    matrices = matrices_of(tiny_model_of("nemotron_h"))
    of_experts = [name for name in matrices if ".experts." in name]
    assert sorted(of_experts) == sorted(
        f"model.layers.2.mixer.experts.{index}.{part}_proj" for index in range(4) for part in ("up", "down")
    )


def test_matrices_are_found_on_the_meta_device() -> None:
    with torch.device("meta"):
        empty = matrices_of(AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **FAMILIES["mixtral"])))
    real = matrices_of(tiny_model_of("mixtral"))
    assert {name: one.weight.shape for name, one in empty.items()} == {
        name: one.weight.shape for name, one in real.items()
    }
    assert all(matrix.weight.is_meta for matrix in empty.values())


def test_a_packed_layer_has_no_matrix(tiny_model: MakeModel) -> None:
    model = pack_(tiny_model("llama"), min_sparsity=0)
    with pytest.raises(UsageError, match="unpack the model first"):
        matrices_of(model)


def test_some_stacks_are_not_reached_by_pruning() -> None:
    """GPT-OSS multiplies with its stacks as (I, O), and mixes the rows of gates and ups."""
    mixtral, gpt_oss = tiny_model_of("mixtral"), tiny_model_of("gpt_oss")
    stacks = [f"model.layers.{index}.mlp.experts.{part}_proj" for index in range(2) for part in ("gate_up", "down")]
    assert list(stacks_in(mixtral)) == list(stacks_in(gpt_oss)) == stacks
    assert unreached_weights(mixtral) == []
    assert unreached_weights(gpt_oss) == stacks
    assert not [name for name in [*matrices_of(gpt_oss), *prunable_linears(mixtral)] if "experts" in name]
    assert {stack.shape for stack in stacks_in(gpt_oss).values()} == {(4, 96, 32), (4, 32, 48)}


@pytest.mark.parametrize(
    ("family", "router"),
    [
        ("qwen2_moe", "mlp.shared_expert_gate"),  # one output
        ("hunyuan_v1_moe", "mlp.gate.wg"),  # the only layer of a module beside the experts
    ],
)
def test_routers_that_are_linear_layers_stay_dense(family: str, router: str) -> None:
    model = tiny_model_of(family)
    name = f"model.layers.1.{router}"
    assert isinstance(model.get_submodule(name), nn.Linear)
    assert name not in matrices_of(model)
    assert name not in prunable_linears(model)
    assert [one for one in prunable_linears(model) if "shared" in one]


def test_a_router_beside_a_list_of_experts_stays_dense() -> None:
    model = causal_model("llama")
    for block in decoder_blocks(model)[1]:
        block.mlp.experts = nn.ModuleList([nn.Linear(32, 32, bias=False) for _ in range(3)])
        block.mlp.router = nn.Linear(32, 3)
        block.router = nn.Linear(32, 3)  # beside no experts
    matrices = matrices_of(model)
    assert "model.layers.0.mlp.router" not in matrices
    assert "model.layers.0.router" in matrices
    assert "model.layers.0.mlp.experts.2" in matrices
    assert "model.layers.0.mlp.up_proj" in matrices


@pytest.mark.parametrize(("family", "name"), [("mixtral", "gate.weight"), ("deepseek_v3", "gate.weight")])
def test_routers_of_other_kinds_stay_dense(family: str, name: str) -> None:
    model = tiny_model_of(family)
    router = model.get_parameter(f"model.layers.1.mlp.{name}")
    assert router.ndim == 2
    assert not [matrix for matrix in matrices_of(model).values() if matrix.weight.data_ptr() == router.data_ptr()]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_classes_that_load_a_family(family: str) -> None:
    config = AutoConfig.for_model(family.partition("-")[0], **FAMILIES[family])
    kind = auto_class(config)
    assert kind is not None
    only_with_images = "vision_config" in FAMILIES[family] and family != "gemma3"  # which transformers has in both
    assert kind.__name__ == ("AutoModelForImageTextToText" if only_with_images else "AutoModelForCausalLM")


@pytest.mark.parametrize("kind", ["t5", "bert", "vit", "vision-encoder-decoder", "florence2", "udop"])
def test_other_families_have_no_class(kind: str) -> None:
    parts = {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2"}} if "vision-" in kind else {}
    config = AutoConfig.for_model(kind, **parts)
    assert kind == "bert" or auto_class(config) is None  # BERT can be a decoder


def test_the_blocks_are_those_of_the_language_model() -> None:
    """A vision tower as deep as it is not mistaken for it, nor pruned."""
    model = tiny_model_of("llava")
    assert len(model.get_submodule("model.vision_tower.encoder.layers")) == 2
    assert decoder_blocks(model)[0] == "model.language_model.layers"
    assert not [name for name in prunable_linears(model) if "vision" in name or "projector" in name]


def test_the_page_has_a_row_for_every_family() -> None:
    assert list(rows()) == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_says_what_the_model_has(family: str) -> None:
    skip_if_unknown(family)
    assert rows()[family][:2] == row_of(tiny_model_of(family), ())[:2]


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


def test_refuses_a_module_that_is_no_model() -> None:
    with pytest.raises(UsageError, match="Linear is not"):
        decoder_blocks(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_says_what_it_saw_where_blocks_cannot_be_told(tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(UsageError, match=r"num_hidden_layers = 7 entries .* seen: model.layers with 2$"):
        decoder_blocks(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_refuses_quantized_weights(tiny_model: MakeModel, dtype: torch.dtype) -> None:
    model = tiny_model("llama")
    module = model.get_submodule("model.layers.1.mlp.up_proj")
    module.weight = nn.Parameter(torch.zeros(48, 32).to(dtype), requires_grad=False)
    with pytest.raises(UsageError, match="model.layers.1.mlp.up_proj: the weight is quantized"):
        prunable_linears(model)
