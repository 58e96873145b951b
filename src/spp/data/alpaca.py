"""The Stanford Alpaca template, with a line break before the answer as in the published fine-tuning scripts."""

from __future__ import annotations

_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The prompt of an Alpaca item; the answer follows it directly.

    Args:
        instruction: the item's `instruction`.
        context: the item's `input`; if it is blank, the template without input is used.
    """
    template = _WITH_INPUT if context.strip() else _PLAIN
    return template.format(instruction=instruction, input=context)
