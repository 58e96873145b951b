"""What tests share: tiny random models of every family, a tiny tokenizer, and the optional real data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = _DECODER | {"num_key_value_heads": 2}
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GQA,
    "mistral": _GQA,
    "qwen2": _GQA,
    "qwen3": _GQA | {"head_dim": 8},
    "gemma": _GQA | {"head_dim": 8},
    "phi": _DECODER,
    "gpt_neox": _DECODER,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 96,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
}


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Make a tiny random model: `tiny_model("llama", num_hidden_layers=3)`; the same weights for the same call."""

    def make(family: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(TINY_CONFIGS[family] | changes))
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, within the tiny models' 96 tokens; BOS in front of every text."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    characters = [chr(code) for code in range(32, 127) if chr(code) not in "^`~{"]
    vocabulary = {token: index for index, token in enumerate(special + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )


@pytest.fixture
def tiny_checkpoint(tmp_path, tiny_model, tiny_tokenizer) -> Path:
    """Folder of a dense tiny Llama in bf16 with its tokenizer."""
    folder = tmp_path / "dense"
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def stories(tmp_path) -> Path:
    """A .jsonl file of 200 short, repetitive documents that a tiny model can learn."""
    animals, verbs = ("cat", "dog", "owl", "hen", "fox"), ("sat", "ran", "saw", "hid")
    lines = [
        json.dumps({"text": f"The {animals[i % 5]} {verbs[i % 4]}. The {animals[(i + 1) % 5]} {verbs[i % 4]} too."})
        for i in range(200)
    ]
    path = tmp_path / "stories.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real models and texts, kept beside the checkout; tests that need it skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data (small real models and texts), which this machine does not have")
    return folder
