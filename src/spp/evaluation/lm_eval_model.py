"""A model for lm-eval: its own wrapper `HFLM`, with the cases handled that `HFLM` does not.

What `HFLM` generates for tasks with free answers is left as it is.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from spp.data.tokens import require_known_ids
from spp.errors import SppError

_HFLM: Any = import_module("lm_eval.models.huggingface").HFLM  # an extra; whoever imports this module needs it

_Tokens = tuple[Any, list[int], list[int]]
"""One request: its key, the token ids of the context, and those of the answer."""


class ScoredModel(_HFLM):
    """lm-eval's `HFLM`, which computes all log-likelihoods.

    Attributes:
        shortened: number of answers whose prompt was cut at its beginning, to fit into the model's context.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int, window: int | None, bos: bool | None = None
    ) -> None:
        # Some character models have neither BOS nor EOS, but lm-eval needs one. Any id will do: it would be used for an
        # empty prompt only, and no prompt is empty.
        nothing = tokenizer.bos_token_id is None and tokenizer.eos_token_id is None
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=window,
            add_bos_token=bos,
            prefix_token_id=0 if nothing else None,
        )
        self.shortened = 0

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As in lm-eval, but with progress bars on a terminal only."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """As in lm-eval, but with progress bars on a terminal only."""
        return super().generate_until(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests: Sequence[_Tokens], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        longest = max(len(answer) for _, _, answer in requests)
        if longest > self.max_length:
            raise SppError(f"an answer has {longest} tokens, and the model's context has {self.max_length}")
        vocabulary = self.config.get_text_config().vocab_size
        require_known_ids([context + answer for _, context, answer in requests], vocabulary, "tasks' text")
        # The model gets the tokens of prompt and answer except the last, which is only predicted.
        self.shortened += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        scores = super()._loglikelihood_tokens(requests, *args, **kwargs)
        if any(math.isnan(score) for score, _ in scores):
            raise SppError(
                "the model gives log-likelihoods that are not a number; its weights are damaged, or the dtype is too "
                "narrow for them (pass --dtype float32)"
            )
        return scores
