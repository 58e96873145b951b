"""`spp generate`: continue a text with a sparse model, packed or not, and measure the speed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.generation.streamers import BaseStreamer

from spp.adapters.attach import check_adapter, with_adapter
from spp.checkpoints.hub import resolve_model
from spp.data.tokens import require_known_ids
from spp.errors import SppError, UsageError, brief
from spp.evaluation.options import GenerateOptions
from spp.models.few_bit_linear import FewBitLinear
from spp.models.loading import context_of, load_base, load_tokenizer
from spp.models.packed_linear import PackedLinear
from spp.ops.dtypes import dtype_name
from spp.runtime.devices import pick_device
from spp.runtime.memory import peak_memory_bytes


@dataclass(frozen=True, kw_only=True)
class GenerateReport:
    """The result of `generate`.

    Attributes:
        text: the generated text, without the prompt and special tokens.
        prompt_seconds: time until the first new token.
        tokens_per_second: speed of the tokens after the first; 0 if there are none.
        weight_bytes: memory of all parameters.
        packed: number of layers whose weights are packed.
        peak_memory_bytes: peak on a CUDA device; elsewhere the peak of the process.
    """

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    tokens_per_second: float
    weight_bytes: int
    packed: int
    dtype: str
    peak_memory_bytes: int


def generate(options: GenerateOptions) -> GenerateReport:
    """Continue `options.prompt`, greedily or by sampling at a temperature.

    Raises:
        UsageError: a wrong option, a missing model or adapter, or a prompt longer than the model's context.
        SppError: a damaged model or adapter, whose output is not finite.
    """
    device = pick_device(options.device)
    model, tokenizer, dtype = _load(options, device)
    prompt = tokenizer(options.prompt, return_tensors="pt").to(device)
    length = int(prompt["input_ids"].shape[1])
    if not length:
        raise UsageError("the tokenizer makes no token of the prompt; give a longer one")
    require_known_ids([prompt["input_ids"][0].tolist()], model.config.get_text_config().vocab_size, "prompt")
    _require_room(model, length, options.max_new_tokens)
    set_seed(options.seed)
    clock = _Clock()
    new = _continue(model, tokenizer, prompt, options, clock)[length:]
    later = clock.times[-1] - clock.times[1]
    return GenerateReport(
        prompt=options.prompt,
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        prompt_tokens=length,
        new_tokens=len(new),
        prompt_seconds=clock.times[1] - clock.started,
        tokens_per_second=(len(new) - 1) / later if later else 0.0,
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        packed=sum(isinstance(module, PackedLinear | FewBitLinear) for module in model.modules()),
        dtype=dtype,
        peak_memory_bytes=peak_memory_bytes(device),
    )


def _load(
    options: GenerateOptions, device: torch.device
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, str]:
    """The model on its device, with the adapter if there is one; its tokenizer; and the dtype of its weights."""
    folder = resolve_model(options.model, code=options.trust_remote_code)
    if options.adapter is not None:
        check_adapter(options.adapter, options.model, folder)
    tokenizer = load_tokenizer(folder, options)
    base = load_base(
        folder, options, dtype=options.dtype, pack=options.pack, on=device, few_bits=options.adapter is None
    )
    dtype = dtype_name(base.dtype)
    model = base if options.adapter is None else with_adapter(base, options.adapter)
    model.to(device)  # pyright: ignore[reportArgumentType]
    return model, tokenizer, dtype


def _continue(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Mapping[str, Tensor],
    options: GenerateOptions,
    clock: _Clock,
) -> Tensor:
    """Token ids of the prompt and its continuation, (T,)."""
    drawing: dict[str, Any] = (
        {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    )
    try:
        with torch.inference_mode():
            output: Any = model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=prompt["input_ids"],
                attention_mask=prompt["attention_mask"],
                max_new_tokens=options.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                streamer=clock,
                logits_processor=LogitsProcessorList([_RequireNumbers()]),
                **drawing,
            )
    except (SppError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers checks generation_config.json late, or not at all
        raise SppError(
            f"{options.model} generates nothing: {brief(error)}; its generation_config.json may be damaged: remove it, "
            "or copy it again"
        ) from error
    return output[0]


class _RequireNumbers(LogitsProcessor):
    """Refuses logits that are NaN or all infinite, of which the likeliest token would be one without a text."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not bool(torch.isfinite(scores.amax())):  # NaN wins, too
            raise SppError(
                "the model gives logits that are NaN or infinite; its weights or the adapter are damaged, or the dtype "
                "is too narrow for them (pass --dtype float32)"
            )
        return scores


def _require_room(model: PreTrainedModel | PeftModel, prompt: int, more: int) -> None:
    positions = context_of(model.config)
    if positions is not None and prompt + more > positions:
        raise UsageError(
            f"the prompt's {prompt} tokens and --max-new-tokens {more} are more than the model's context of {positions}"
        )


class _Clock(BaseStreamer):
    """Records the time at which generation started, and that of each new token."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """The prompt first, then each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is buffered."""
