"""Loading models and tokenizers: whatever is wrong with them is one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
)

from spp.checkpoints.hub import resolve_model
from spp.checkpoints.json_files import read_json, write_json
from spp.errors import SppError, UsageError
from spp.models.loading import context_window, load_config, load_model, load_tokenizer, skeleton
from spp.options import LoadingOptions
from spp.runtime.devices import compute_dtype, pick_device, training_dtype

CPU = LoadingOptions(device="cpu")
UP = "model.layers.0.mlp.up_proj.weight"


def refusal(call, *arguments, kind=UsageError) -> str:
    """The message of the error that a call must end in, which is one line of bearable length."""
    with pytest.raises(SppError) as caught:
        call(*arguments)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    return message


def edit_config(folder: Path, **changes) -> Path:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **changes})
    return folder


def edit_weights(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_comes_in_eval_mode_on_its_device(tiny_checkpoint):
    model = load_model(tiny_checkpoint, LoadingOptions(device="auto"))
    assert not model.training
    assert model.device == pick_device("auto")
    stored = load_file(tiny_checkpoint / "model.safetensors")[UP]
    assert model.get_parameter(UP).cpu().to(stored.dtype).equal(stored)


@pytest.mark.parametrize(
    ("asked", "given", "dtype"),
    [
        ("auto", None, torch.float32),
        ("float16", None, torch.float16),
        ("bfloat16", None, torch.bfloat16),
        ("float32", None, torch.float32),
        ("float32", "auto", torch.bfloat16),
        ("auto", torch.float64, torch.float64),
    ],
)
def test_a_bf16_checkpoint_on_a_cpu_gets_the_dtype_that_is_asked_for(tiny_checkpoint, asked, given, dtype):
    model = load_model(tiny_checkpoint, LoadingOptions(device="cpu", dtype=asked), dtype=given)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_auto_keeps_the_checkpoints_dtype_on_an_accelerator():
    assert compute_dtype("auto", torch.device("cuda")) == "auto"
    assert compute_dtype("auto", torch.device("mps")) == "auto"
    assert compute_dtype("auto", torch.device("cpu")) == torch.float32
    assert compute_dtype("float16", torch.device("cuda")) == torch.float16


@pytest.mark.parametrize(
    ("asked", "device", "stored", "instructions", "expected"),
    [
        ("auto", "cpu", torch.bfloat16, {"avx512_bf16": True}, torch.bfloat16),
        ("auto", "cpu", torch.bfloat16, {"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ("auto", "cpu", torch.bfloat16, {"avx2": True, "avx512_bf16": False}, torch.float32),
        ("auto", "cpu", torch.float32, {"avx512_bf16": True}, torch.float32),
        ("auto", "cpu", torch.float16, {"avx512_bf16": True}, torch.float32),
        ("auto", "cpu", None, {"avx512_bf16": True}, torch.float32),
        ("float32", "cpu", torch.bfloat16, {"avx512_bf16": True}, torch.float32),
        ("bfloat16", "cpu", torch.float32, {}, torch.bfloat16),
        ("auto", "cuda", torch.bfloat16, {}, "auto"),
    ],
)
def test_the_dtype_of_training(monkeypatch, asked, device, stored, instructions, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert training_dtype(asked, torch.device(device), stored) == expected


@pytest.mark.parametrize("device", ["nonsense", "", "cuda:x", "gpu"])
def test_an_unknown_device_is_refused(device):
    assert "is unknown; use auto, cpu, cuda, cuda:1 or mps" in refusal(pick_device, device)


@pytest.mark.parametrize("device", ["cuda:99", "meta", "xla"])
def test_a_device_that_is_not_here_is_refused(device, tiny_checkpoint):
    assert "is not on this machine" in refusal(pick_device, device)
    assert device in refusal(load_model, tiny_checkpoint, LoadingOptions(device=device))


def test_the_cpu_is_always_there():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in {"cpu", "cuda", "mps", "xpu"}


def test_each_of_several_processes_gets_an_accelerator_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert pick_device("auto") == torch.device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")
    assert "one for several processes; pass --device cuda" in refusal(pick_device, "cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert "2 accelerators are not enough for 3 processes" in refusal(pick_device, "auto")


def test_a_missing_model_is_refused(tmp_path, monkeypatch):
    assert "no such folder" in refusal(resolve_model, str(tmp_path / "missing"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached" in refusal(resolve_model, "nobody/nothing")


def test_a_folder_without_weights_is_refused(tiny_checkpoint):
    (tiny_checkpoint / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refusal(load_model, tiny_checkpoint, CPU)


def test_a_truncated_file_is_named(tiny_checkpoint):
    path = tiny_checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = refusal(load_model, tiny_checkpoint, CPU, kind=SppError)
    assert "model.safetensors" in message and "truncated" in message


def test_a_missing_shard_is_named(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    lost = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    lost.unlink()
    assert lost.name in refusal(load_model, tmp_path / "model", CPU, kind=SppError)


def test_missing_weights_are_counted_and_named(tiny_checkpoint):
    model = edit_weights(tiny_checkpoint, lambda tensors: tensors.pop(UP))
    assert f"lacks 1 weights, e.g. {UP}" in refusal(load_model, model, CPU, kind=SppError)


def test_weights_of_another_shape_are_named(tiny_checkpoint):
    model = edit_weights(tiny_checkpoint, lambda tensors: tensors.update({UP: torch.zeros(4, 4)}))
    message = refusal(load_model, model, CPU, kind=SppError)
    assert f"e.g. {UP} with (4, 4) instead of (48, 32)" in message


def test_a_tied_head_is_not_missing(tiny_model, tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_model(tmp_path, CPU)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_an_encoder_decoder_is_no_causal_lm(tmp_path):
    config = T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert "is of type 't5', which is no causal language model" in refusal(load_model, tmp_path, CPU)


def test_an_encoder_is_no_causal_lm(tmp_path):
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32)
    BertModel(config).save_pretrained(tmp_path)
    assert "lacks 6 weights" in refusal(load_model, tmp_path, CPU, kind=SppError)


@pytest.mark.parametrize("load", [load_model, load_config])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "nonsense"}, "nonsense"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "pass --trust-remote-code if you trust it"),
    ],
)
def test_an_invalid_configuration_is_refused_with_the_reason(tiny_checkpoint, load, changes, reason):
    message = refusal(load, edit_config(tiny_checkpoint, **changes), CPU)
    assert "no usable config.json" in message
    assert reason in message


ODD_VALUES = {
    "rope_parameters.rope_type 'odd'": {"rope_parameters": {"rope_type": "odd", "rope_theta": 1e4}},
    "rope_parameters.rope_type 'old'": {
        "rope_scaling": {"rope_type": "old", "factor": 2.0},
        "rope_parameters": None,
    },
    "hidden_act 'none_such'": {"hidden_act": "none_such"},
    'attn_implementation="none_such"': {"attn_implementation": "none_such"},
    "division": {"num_key_value_heads": 0},
}


@pytest.mark.filterwarnings("ignore:.*rope")
@pytest.mark.parametrize("reason", ODD_VALUES)
@pytest.mark.parametrize("load", ["load_model", "load_packed", "skeleton"])
def test_a_value_that_no_model_can_be_made_of_is_named(tiny_checkpoint, load, reason):
    edit_config(tiny_checkpoint, **ODD_VALUES[reason])
    make = {
        "load_model": lambda: load_model(tiny_checkpoint, CPU),
        "load_packed": lambda: load_model(tiny_checkpoint, CPU, pack=True),
        "skeleton": lambda: skeleton(tiny_checkpoint, CPU, torch.float32),
    }
    message = refusal(make[load], kind=SppError)
    assert "cannot be built from its config.json" in message
    assert reason in message
    assert "KeyError" not in message


@pytest.mark.parametrize("load", [load_model, load_config])
def test_a_damaged_or_missing_configuration_is_refused(tiny_checkpoint, load):
    (tiny_checkpoint / "config.json").write_text("{")
    assert "not valid JSON" in refusal(load, tiny_checkpoint, CPU)
    (tiny_checkpoint / "config.json").unlink()
    assert "no usable config.json" in refusal(load, tiny_checkpoint, CPU)


def test_a_back_end_that_is_not_installed_is_named(tiny_checkpoint):
    model = edit_config(tiny_checkpoint, quantization_config={"quant_method": "aqlm"})
    assert "aqlm" in refusal(load_model, model, CPU, kind=SppError)


@pytest.mark.parametrize("value", [False, "int8", [1]])
def test_a_quantization_config_that_is_none_is_named(tiny_checkpoint, value):
    model = edit_config(tiny_checkpoint, quantization_config=value)
    assert "its quantization_config is " + repr(value) in refusal(load_config, model, CPU)


def test_the_tokenizer_is_loaded(tiny_checkpoint, tiny_tokenizer):
    tokenizer = load_tokenizer(tiny_checkpoint, CPU)
    assert tokenizer("The cat").input_ids == tiny_tokenizer("The cat").input_ids


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen2", "gemma", "gpt_neox"])
def test_a_missing_tokenizer_is_refused(family, tiny_model, tmp_path):
    """For most families transformers makes one up that turns every text into nothing."""
    tiny_model(family).save_pretrained(tmp_path)
    assert "has no usable tokenizer" in refusal(load_tokenizer, tmp_path, CPU)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"version": "1.0", "model": {"type": "Nonsense"}}', ""])
def test_a_damaged_tokenizer_is_refused(tiny_checkpoint, content):
    (tiny_checkpoint / "tokenizer.json").write_text(content)
    assert "has no usable tokenizer" in refusal(load_tokenizer, tiny_checkpoint, CPU)


def test_a_tokenizer_that_brings_code_is_refused_with_the_option_that_trusts_it(tiny_checkpoint):
    write_json(tiny_checkpoint / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}})
    message = refusal(load_tokenizer, tiny_checkpoint, CPU)
    assert "has no usable tokenizer" in message
    assert "pass --trust-remote-code if you trust it" in message


def test_a_tokenizer_whose_limit_is_no_number_is_refused(tiny_checkpoint):
    path = tiny_checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": [[]]}))
    assert "model_max_length is [[]], and not a number" in refusal(load_tokenizer, tiny_checkpoint, CPU)


@pytest.mark.parametrize(
    ("positions", "asked", "window"),
    [(64, None, 64), (64, 64, 64), (64, 16, 16), (4096, None, 2048), (4096, 4096, 4096)],
)
def test_the_window_defaults_to_the_context_and_at_most_2048(positions, asked, window):
    assert context_window(LlamaConfig(max_position_embeddings=positions), asked) == window
    assert context_window(GPT2Config(n_positions=positions), asked) == window


def test_a_window_beyond_the_context_is_refused():
    message = refusal(context_window, LlamaConfig(max_position_embeddings=64), 65)
    assert "window 65 is longer than the model's context of 64 tokens" in message


def test_nothing_bounds_the_window_of_a_model_without_positions():
    assert context_window(BloomConfig(), 100_000) == 100_000
    assert context_window(BloomConfig(), None) == 2048


def test_a_context_of_minus_one_is_no_limit():
    assert context_window(XLNetConfig(), 100_000) == 100_000
    assert context_window(XLNetConfig(), None) == 2048


@pytest.mark.parametrize("name", ["story", "stories260K", "shakespeare_opt"])
def test_real_models_are_loaded(shared_data, name):
    folder = shared_data / "models" / name
    assert load_model(folder, CPU).num_parameters() > 200_000
    tokenizer = load_tokenizer(folder, CPU)
    assert tokenizer.decode(tokenizer("the end", add_special_tokens=False).input_ids).strip() == "the end"
