"""The published Alpaca template, written out a second time as whole texts."""

from __future__ import annotations

import pytest

from spp.data.alpaca import alpaca_prompt


def test_a_prompt_without_input_is_the_published_text():
    assert (
        alpaca_prompt("Name three colours.")
        == """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Name three colours.

### Response:
"""
    )


def test_a_prompt_with_input_is_the_published_text():
    assert (
        alpaca_prompt("Translate to French.", "Good morning.\nGood night.")
        == "Below is an instruction that describes a task, paired with an input that provides further context. "
        """Write a response that appropriately completes the request.

### Instruction:
Translate to French.

### Input:
Good morning.
Good night.

### Response:
"""
    )


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_a_blank_input_counts_as_no_input(blank):
    assert alpaca_prompt("Go.", blank) == alpaca_prompt("Go.")


def test_braces_in_the_text_are_kept():
    prompt = alpaca_prompt("What does f'{input}' print?", "{instruction} {0} {")
    assert "What does f'{input}' print?" in prompt
    assert "{instruction} {0} {" in prompt
