"""The published Alpaca template, written out a second time as whole texts."""

from __future__ import annotations

import pytest

from spp.data.alpaca import alpaca_prompt


def test_without_input():
    assert (
        alpaca_prompt("Name three colours.")
        == """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Name three colours.

### Response:
"""
    )


def test_with_input():
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
def test_a_blank_input_is_none(blank):
    assert alpaca_prompt("Go.", blank) == alpaca_prompt("Go.")


def test_braces_are_text():
    prompt = alpaca_prompt("What does f'{input}' print?", "{instruction} {0} {")
    assert "What does f'{input}' print?" in prompt
    assert "{instruction} {0} {" in prompt
