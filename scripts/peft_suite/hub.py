"""Write tiny random models under the names that PEFT's tests load, as a Hugging Face cache in `HF_HOME`.

    HF_HOME=build/peft-suite/hub python scripts/peft_suite/hub.py

With `HF_HUB_OFFLINE=1` the libraries then find them by name, through their own code for the cache.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import transformers
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

COMMIT = "0" * 40
VOCABULARY = 128
WORDS = ["<unk>", "<pad>", "<s>", "</s>", "this", "is", "a", "test", "prompt", "."]

_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "max_position_embeddings": 64,
}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 4,
    "max_position_embeddings": 100,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
    "max_position_embeddings": 100,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_GEMMA3 = {**_LLAMA, "head_dim": 8, "sliding_window": 16}
_DEBERTA = {**_BERT, "type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}

# Name on the hub -> model class, settings of its configuration.
MODELS = {
    "bert-base-uncased": ("BertForSequenceClassification", _BERT),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", _GEMMA3),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", {**_OPT, "hidden_size": 768, "word_embed_proj_dim": 768}),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _BART),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _BERT),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", _DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", _DEBERTA),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _OPT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _BERT),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", _T5),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        {**_LLAMA, "num_labels": 1},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
}


def main() -> None:
    """Write all of it anew."""
    cache = Path(os.environ["HF_HOME"]) / "hub"
    shutil.rmtree(cache, ignore_errors=True)
    tokenizer = make_tokenizer()
    for name, (class_name, settings) in MODELS.items():
        folder = make_repository(cache, name, "main")
        model_class = getattr(transformers, class_name)
        torch.manual_seed(0)
        model_class(model_class.config_class(**settings)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # PEFT's tests of configurations read one from a branch of this repository.
    LoraConfig().save_pretrained(make_repository(cache, "peft-internal-testing/tiny-opt-lora-revision", "test"))


def make_repository(cache: Path, name: str, branch: str) -> Path:
    """An empty repository with one commit on `branch`, and the folder for that commit's files."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / branch).write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    words = WORDS + [f"word{index}" for index in range(VOCABULARY - len(WORDS))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=WORDS[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(zip(("unk_token", "pad_token", "bos_token", "eos_token"), WORDS, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


if __name__ == "__main__":
    main()
