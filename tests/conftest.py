"""What tests share: tiny random models of every family, a tiny tokenizer, and the optional real data."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

# The families that everything is tested with; `families.py` has more, for what depends on the architecture.
_EVERYWHERE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "gpt_neox", "opt", "gpt2")
TINY_CONFIGS: dict[str, dict[str, Any]] = {name: FAMILIES[name] for name in _EVERYWHERE}


def pytest_collection_finish() -> None:
    """Modules and collected tests stay; each run of the Trainer collects garbage, and would walk over all of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("SPP_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A test that runs the command line leaves the logger as it found it."""
    logger = logging.getLogger("spp")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


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
