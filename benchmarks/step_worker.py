"""One method of `benchmarks/step.py` in a process of its own: build a random pruned Llama, train it a few steps.

Takes a JSON object of `Settings` as its argument, and prints one JSON object.

Weights are made layer by layer and, for packed methods, packed at once, so that building takes no more memory than the
model that comes of it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks.baselines.finetuning import MaskedLora, MaskedWeight, replace_linears
from benchmarks.common import sparse_weight
from spp.adapters.options import AdapterSettings
from spp.models.architecture import prunable_linears
from spp.models.pack_model import packed_layer
from spp.models.trainable_values import trainable_values
from spp.runtime.memory import peak_rss_bytes
from spp.training.new_adapter import target_layers, with_new_adapter

RANK = 16
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "300m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}


def _spp(model: PreTrainedModel) -> nn.Module:
    """As `spp train` has it: no more parameters in any layer than LoRA of rank 16."""
    return with_new_adapter(model, target_layers(model, "all-linear"), AdapterSettings(lora_rank=RANK))


def _full(model: PreTrainedModel) -> nn.Module:
    """As `spp train --method full` has it: the values of the packed layers, in fp32."""
    trainable_values(model)
    return model


def _peft(config: Callable[..., PeftConfig]) -> Callable[[PreTrainedModel], nn.Module]:
    return lambda model: get_peft_model(model, config(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))


METHODS: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "spp": _spp,
    "spp_dense": _spp,
    "peft_lora": _peft(LoraConfig),
    "peft_hira": _peft(HiraConfig),
    "masked_lora": partial(replace_linears, make=MaskedLora),
    "full": _full,
    "masked_full": partial(replace_linears, make=MaskedWeight),
}
PACKED = ("spp", "full")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one process does.

    Attributes:
        method: a key of `METHODS`.
        size: a key of `SIZES`.
        sparsity: share of zeros in the decoder's linear layers.
        batch, tokens: sequences per step, and tokens in each.
        steps: training steps that are timed, after one that is not.
        threads: of torch; None leaves it alone.
    """

    method: str
    size: str
    sparsity: float
    batch: int
    tokens: int
    steps: int
    threads: int | None = None


def run(settings: Settings) -> dict[str, Any]:
    """Build, train, and report.

    Returns:
        step_ms (one per step), losses, trained_parameters, and imports_bytes, built_bytes and peak_bytes: the process's
        resident memory after imports, with the adapted model, and at its highest.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    imports = psutil.Process().memory_info().rss
    torch.manual_seed(0)
    model = random_llama(settings.size, settings.sparsity, packed=settings.method in PACKED)
    adapted = METHODS[settings.method](model)
    built = psutil.Process().memory_info().rss
    step_ms, losses = _train(adapted, settings)
    return {
        "step_ms": step_ms,
        "losses": losses,
        "trained_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "imports_bytes": imports,
        "built_bytes": built,
        "peak_bytes": peak_rss_bytes(),
    }


def random_llama(size: str, sparsity: float, *, packed: bool) -> LlamaForCausalLM:
    """A frozen random Llama in bf16, its decoder's linear layers magnitude-pruned row by row."""
    config = LlamaConfig(vocab_size=32000, use_cache=False, **SIZES[size])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    prunable = list(prunable_linears(model))  # names only: a module kept alive keeps its weight
    for seed, name in enumerate(prunable):
        linear = model.get_submodule(name)
        weight = sparse_weight(linear.out_features, linear.in_features, 1 - sparsity, torch.bfloat16, seed=seed)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if packed:
            model.set_submodule(name, packed_layer(linear))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                module.register_parameter(name, _made(parameter))
    return model.train()


def _made(parameter: nn.Parameter) -> nn.Parameter:
    """A norm's ones, or small random numbers for an embedding."""
    data = torch.ones(parameter.shape, dtype=torch.bfloat16)
    if data.ndim > 1:
        data.normal_(std=0.02)
    return nn.Parameter(data, requires_grad=False)


def _train(model: nn.Module, settings: Settings) -> tuple[list[float], list[float]]:
    """Milliseconds and losses of the timed steps: forward, loss, backward, AdamW on what is trained, under autocast."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(32000, (settings.batch, settings.tokens), generator=torch.Generator().manual_seed(1))
    times, losses = [], []
    for _ in range(1 + settings.steps):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append((time.perf_counter() - began) * 1e3)
        losses.append(loss.item())
    return times[1:], losses[1:]


if __name__ == "__main__":
    print(json.dumps(run(Settings(**json.loads(sys.argv[1])))))
