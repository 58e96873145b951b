"""SPP as a PEFT tuner: everything that users of PEFT do with an adapter, on a sparse model whose zeros must stay."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
from families import tiny_model_of
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.pytorch_utils import Conv1D

from spp import SppConfig
from spp.adapters.tuner import SppLinear, SppModel
from spp.adapters.tuner.registration import register
from spp.models.architecture import weight_oi
from spp.ops.reference import merged_weight
from spp.patterns import NM

IDS = torch.arange(4, 36).view(2, 16)


@pytest.fixture
def sparse_model(tiny_model):
    """Make a tiny model whose linear layers in the blocks are 2:4 sparse."""

    def make(family="llama", **changes):
        model = tiny_model(family, **changes)
        with torch.no_grad():
            for module in model.base_model.modules():
                if isinstance(module, nn.Linear | Conv1D):
                    weight = weight_oi(module)
                    weight.masked_fill_(~NM(2, 4).keep_mask(weight.float().abs()), 0.0)
        return model

    return make


def with_adapter(model, *, seed=0, size=0.3, **settings):
    """The model with an adapter on it whose B is not zero."""
    drawn = {"r": 4, "task_type": "CAUSAL_LM", "init_weights": "published"}
    adapted = get_peft_model(model, SppConfig(**{**drawn, **settings}))
    fill(adapted, "default", seed, size)
    return adapted.eval()


def fill(adapted, adapter, seed=0, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    for module in adapted.modules():
        if isinstance(module, SppLinear) and adapter in module.spp_B:
            B = module.spp_B[adapter].weight
            B.data = (torch.randn(B.shape, generator=generator) * size).to(B)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def layers(model):
    return [module for module in model.modules() if isinstance(module, SppLinear)]


def test_registration_is_complete_and_happens_once():
    assert PeftType("SPP") is PeftType.SPP is PeftType["SPP"]
    assert PeftType.SPP == "SPP" and PeftType.SPP.value == "SPP" and list(PeftType).count("SPP") == 1
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SPP] is SppConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["SPP"] is SppModel
    register()
    assert list(PeftType).count("SPP") == 1
    assert copy.deepcopy(PeftType.SPP) is PeftType.SPP


@pytest.mark.parametrize("order", ["import spp, peft", "import peft, spp", "from peft import PeftModel; import spp"])
def test_import_spp_is_enough_whatever_the_order(order):
    code = f"{order}\nfrom peft.utils import PeftType\nassert 'SPP' in PeftType.__members__"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("init", [True, "ones", "published"])
def test_a_fresh_adapter_changes_nothing_and_only_it_is_trained(sparse_model, init):
    model = sparse_model()
    before = logits(model)
    linears = sum(isinstance(module, nn.Linear) for module in model.base_model.modules())
    adapted = get_peft_model(model, SppConfig(r=4, task_type="CAUSAL_LM", init_weights=init)).eval()
    assert torch.equal(logits(adapted), before)
    assert len(layers(adapted)) == linears
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * linears and all(".spp_A." in name or ".spp_B." in name for name in trained)
    bound = 32**-0.5
    A, B = (factor["default"].weight.detach() for factor in (layers(adapted)[0].spp_A, layers(adapted)[0].spp_B))
    if init != "published":
        # 4 groups of 8 rows, in each of which two rows have one of the 4 directions.
        assert not A.any() and A.shape == (16, 32) and B.equal(torch.eye(4).repeat_interleave(2, 0).repeat(4, 1))
        return
    assert A.abs().max() <= bound and float(A.std()) == pytest.approx(bound / 3**0.5, rel=0.2)
    assert not B.any()


def test_a_saved_adapter_loads_with_the_same_logits(sparse_model, tmp_path):
    model = sparse_model()
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    adapted = with_adapter(model)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.model.layers.0.mlp.up_proj.spp_A.weight"].shape == (4 * 4, 32)
    assert saved["base_model.model.model.layers.0.mlp.up_proj.spp_B.weight"].shape == (48, 4)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for load in (
        lambda: PeftModel.from_pretrained(base, tmp_path / "adapter"),
        lambda: AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        lambda: PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter", low_cpu_mem_usage=True
        ),
    ):
        assert torch.equal(logits(load()), expected)
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    native.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(native), expected)


def test_adapters_are_switched_combined_saved_and_deleted_by_name(sparse_model, tmp_path):
    model = sparse_model()
    plain = logits(model)
    adapted = with_adapter(model)
    first = logits(adapted)
    adapted.add_adapter("other", SppConfig(r=3, scale=1.0, target_modules=["q_proj", "down_proj"]))
    fill(adapted, "other", seed=7)
    assert torch.equal(logits(adapted), first)
    adapted.set_adapter("other")
    second = logits(adapted)
    assert not torch.equal(first, second)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), plain)
    adapted.base_model.set_adapter(["default", "other"])
    both = logits(adapted)
    adapted.base_model.set_adapter("default")
    assert torch.equal(logits(adapted), first)

    adapted.base_model.set_adapter(["default", "other"])
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), both)
    adapted.unmerge_adapter()

    adapted.save_pretrained(tmp_path, selected_adapters=["other"])
    saved = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert len(saved) == 2 * 4 and all("other" not in key for key in saved)
    adapted.base_model.set_adapter("default")
    adapted.delete_adapter("other")
    assert torch.equal(logits(adapted), first)


def test_two_active_adapters_add_up(sparse_model):
    adapted = with_adapter(sparse_model())
    adapted.add_adapter("other", SppConfig(r=2, scale=0.5))
    fill(adapted, "other", seed=3)
    layer = layers(adapted)[0]
    x = torch.randn(5, layer.in_features)
    weight = layer.base_layer.weight
    total = weight + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    adapted.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), x @ total.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merging_keeps_zeros_and_unmerging_restores_every_bit(sparse_model, dtype, family):
    model = sparse_model(family, dtype=dtype)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapted = with_adapter(model)
    expected = logits(adapted)
    adapted.merge_adapter()
    for layer in layers(adapted):
        zeros = layer._weight_before_merge == 0
        assert zeros.sum() * 2 == zeros.numel()
        assert not torch.signbit(layer.weight[zeros]).any() and not layer.weight[zeros].any()
    if family == "llama":  # what is trained is what is deployed, to the bit; Conv1D multiplies in another order
        assert torch.equal(logits(adapted), expected)
    near = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(logits(adapted), expected, rtol=near, atol=near)
    adapted.unmerge_adapter()
    for name, parameter in adapted.base_model.model.named_parameters():
        if "spp_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")])
    assert torch.equal(logits(adapted), expected)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layers(adapted)[0].unmerge()


def test_merge_and_unload_equals_the_formula(sparse_model):
    model = sparse_model(dtype=torch.bfloat16)
    before = {name: module.weight.clone() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    adapted = with_adapter(model, scale=3.0)
    factors = {
        name.removeprefix("base_model.model."): (m.spp_A["default"].weight.clone(), m.spp_B["default"].weight.clone())
        for name, m in adapted.named_modules()
        if isinstance(m, SppLinear)
    }
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    assert not layers(merged)
    for name, (A, B) in factors.items():
        assert torch.equal(merged.get_submodule(name).weight, merged_weight(before[name], A, B, 3.0))
    assert torch.equal(logits(merged), expected)


def test_merging_in_two_steps_is_merging_both_at_once(sparse_model):
    adapted = with_adapter(sparse_model())
    adapted.add_adapter("other", SppConfig(r=2))
    fill(adapted, "other", seed=3)
    twin = copy.deepcopy(adapted)
    adapted.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        adapted.merge_adapter(["other"])
    twin.merge_adapter(["default", "other"])
    for ours, theirs in zip(layers(adapted), layers(twin), strict=True):
        assert torch.equal(ours.weight, theirs.weight)


def test_a_broken_adapter_is_not_merged_safely(sparse_model):
    adapted = with_adapter(sparse_model())
    before = [layer.weight.clone() for layer in layers(adapted)]
    layers(adapted)[0].spp_B["default"].weight.data[0] = float("inf")
    with pytest.raises(ValueError, match="NaNs detected"):
        adapted.merge_adapter(safe_merge=True)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers(adapted), before, strict=True))


def test_dropout_acts_on_the_branch_alone_and_only_in_training(sparse_model):
    adapted = with_adapter(sparse_model(), dropout=0.5)
    layer = layers(adapted)[0]
    x = torch.randn(4000, layer.in_features)
    merged = layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(layer(x), x @ merged.T)
    layer.train()
    torch.manual_seed(0)
    noisy = layer(x) - x @ layer.weight.T
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(noisy, dropped @ layer.get_delta_weight("default").T)


def test_a_bf16_base_has_fp32_factors_with_fp32_gradients(sparse_model):
    adapted = get_peft_model(sparse_model(dtype=torch.bfloat16), SppConfig(r=4, task_type="CAUSAL_LM"))
    dtypes = {parameter.dtype for parameter in adapted.parameters() if parameter.requires_grad}
    assert dtypes == {torch.float32}
    loss = adapted(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)
    assert all(layer.spp_A["default"].weight.grad.any() for layer in layers(adapted))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(sparse_model, reentrant):
    def gradients(checkpointing):
        adapted = with_adapter(sparse_model(attention_dropout=0.0))
        adapted.train()
        if checkpointing:
            adapted.enable_input_require_grads()
            adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
        adapted(IDS, labels=IDS).loss.backward()
        return [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(ours, theirs)


def test_generation_is_the_same_before_and_after_merging(sparse_model):
    adapted = with_adapter(sparse_model())
    prompt = IDS[:1, :4]
    words = adapted.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False
    )
    merged = adapted.merge_and_unload()
    again = merged.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    assert words.shape == (1, 9) and torch.equal(words, again)


def test_trained_by_transformers_trainer_and_trl(sparse_model, tiny_tokenizer, tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"input_ids": IDS.repeat(4, 1).tolist(), "labels": IDS.repeat(4, 1).tolist()})
    shared = {"max_steps": 8, "learning_rate": 0.05, "report_to": [], "use_cpu": True, "logging_steps": 1}
    adapted = get_peft_model(sparse_model(), SppConfig(r=4, task_type="CAUSAL_LM"))
    zeros = [layer.weight == 0 for layer in layers(adapted)]
    trainer = Trainer(adapted, TrainingArguments(str(tmp_path / "a"), **shared), train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]

    text = Dataset.from_dict({"text": ["the cat sat on the mat. " * 2] * 8})
    sft = SFTTrainer(
        sparse_model(),
        SFTConfig(str(tmp_path / "b"), bf16=False, **shared),
        train_dataset=text,
        processing_class=tiny_tokenizer,
        peft_config=SppConfig(r=4, task_type="CAUSAL_LM"),
    )
    sft.train()
    losses = [entry["loss"] for entry in sft.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]

    merged = trainer.model.merge_and_unload()
    linears = [module for module in merged.base_model.modules() if isinstance(module, nn.Linear)]
    for linear, mask in zip(linears, zeros, strict=True):
        assert not linear.weight[mask].any()


def test_checkpoint_wrappers_do_not_lose_the_adapter(sparse_model):
    """PEFT's default returns an empty state dict, silently, where inner modules are wrapped."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    adapted = with_adapter(sparse_model())
    expected = get_peft_model_state_dict(adapted)
    assert len(expected) == 2 * len(layers(adapted))
    apply_activation_checkpointing(adapted, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer")
    wrapped = get_peft_model_state_dict(adapted)
    assert wrapped.keys() == expected.keys()
    assert all(torch.equal(wrapped[key], expected[key]) for key in expected)


def test_offloaded_weights_give_the_same_logits(sparse_model, tmp_path):
    """accelerate keeps the weights on the CPU (here also the execution device) and shows them to hooks only."""
    from accelerate import cpu_offload

    adapted = with_adapter(sparse_model())
    expected = logits(adapted)
    cpu_offload(adapted, execution_device=torch.device("cpu"))
    assert any(parameter.device.type == "meta" for parameter in adapted.parameters())
    assert torch.equal(logits(adapted), expected)


def test_ranks_are_capped_at_the_rows_and_overridden_by_rank_patterns(sparse_model):
    adapted = get_peft_model(sparse_model(), SppConfig(r=40, rank_pattern={"up_proj": 5}, task_type="CAUSAL_LM"))
    ranks = {layer.r["default"] for layer in layers(adapted)}
    assert ranks == {16, 32, 40, 5}  # k/v projections have 16 rows, q/o/down 32, gate 48
    logits(adapted)


def test_layers_to_transform_limits_all_linear(sparse_model):
    adapted = get_peft_model(sparse_model(), SppConfig(r=2, layers_to_transform=[1], task_type="CAUSAL_LM"))
    names = [name for name, module in adapted.named_modules() if isinstance(module, SppLinear)]
    assert len(names) == 7 and all(".layers.1." in name for name in names)


def test_new_tokens_are_trained_and_merged_along(sparse_model):
    model = sparse_model(tie_word_embeddings=False)
    adapted = with_adapter(model, trainable_token_indices={"embed_tokens": [5, 6]})
    adapted(IDS, labels=IDS).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None and "token" in name]
    assert trained
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    assert not layers(merged) and torch.equal(logits(merged), expected)


def test_heads_are_left_out_of_all_linear(tiny_model):
    from transformers import AutoConfig

    from tests.conftest import TINY_CONFIGS

    config = AutoConfig.for_model("llama", **TINY_CONFIGS["llama"], num_labels=3)
    for auto, task in (
        (AutoModelForSequenceClassification, TaskType.SEQ_CLS),
        (AutoModelForTokenClassification, TaskType.TOKEN_CLS),
        (AutoModelForTokenClassification, None),
    ):
        adapted = get_peft_model(auto.from_config(config), SppConfig(r=2, task_type=task, target_modules="all-linear"))
        assert layers(adapted)
        assert not any("score" in name for name, m in adapted.named_modules() if isinstance(m, SppLinear))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.embedding = nn.Embedding(4, 8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x)


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ValueError, match="MultiheadAttention"):
        get_peft_model(Attention(), SppConfig(target_modules=["out_proj"]))
    with pytest.raises(ValueError, match="Embedding, which is not supported"):
        get_peft_model(Attention(), SppConfig(target_modules=["embedding"]))
    with pytest.raises(ValueError, match="not found"):
        get_peft_model(Attention(), SppConfig(target_modules=["nowhere"]))
    quantized = Attention()
    quantized.linear.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantized \\(int8\\)"):
        get_peft_model(quantized, SppConfig(target_modules=["linear"]))
    lora = get_peft_model(Attention(), LoraConfig(target_modules=["linear"]))
    with pytest.raises(ValueError, match="adapter of another method"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(lora.base_model.model, SppConfig(target_modules=["linear"]))
    adapted = get_peft_model(Attention(), SppConfig(target_modules=["linear"]))
    with pytest.raises(ValueError, match="set_adapter"):
        adapted(torch.ones(1, 8), adapter_names=["default"])


def test_wrong_settings_are_named_together():
    with pytest.raises(ValueError, match="r must be.*0.*lora_rank must be.*0.*scale must be.*-1.*dropout must be.*1.5"):
        SppConfig(r=0, lora_rank=0, scale=-1, dropout=1.5)
    with pytest.raises(ValueError, match="layers_to_transform"):
        SppConfig(target_modules="all-linear", layers_to_transform=[0])
    config = SppConfig(target_modules=["q_proj"], layers_to_transform=[0])
    assert config.target_modules == {"q_proj"}


def test_all_linear_leaves_out_layers_whose_weight_the_model_reads_itself(tmp_path):
    """An adapter there would do nothing in training with Mamba's kernels; one that exists is still loaded for use."""
    adapted = get_peft_model(tiny_model_of("bamba"), SppConfig(r=4, task_type="CAUSAL_LM", init_weights=False))
    names = [name for name, module in adapted.named_modules() if isinstance(module, SppLinear)]
    assert any(name.endswith("mamba.in_proj") for name in names)
    assert not [name for name in names if name.endswith("mamba.out_proj")]
    with pytest.raises(ValueError, match="mamba.out_proj: an adapter would have no effect: the model reads its weight"):
        get_peft_model(tiny_model_of("bamba"), SppConfig(r=4, target_modules=["out_proj"]))

    adapted.save_pretrained(str(tmp_path))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    older = {**settings, "target_modules": ["in_proj", "out_proj"], "exclude_modules": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(older))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        loaded = PeftModel.from_pretrained(tiny_model_of("bamba"), str(tmp_path))
    assert isinstance(loaded.get_submodule("base_model.model.model.layers.0.mamba.out_proj"), SppLinear)


def test_a_linear_layer_that_computes_something_else_is_refused():
    with pytest.raises(
        ValueError, match="o_a_proj: an adapter would have no effect: its class, DeepseekV4GroupedLinear"
    ):
        get_peft_model(tiny_model_of("deepseek_v4"), SppConfig(r=4, target_modules=["o_a_proj"]))
