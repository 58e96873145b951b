"""Chat templates in the file of a vision model's processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from spp.data.tokens import render
from spp.errors import UsageError
from spp.models.loading import load_tokenizer
from spp.options import LoadingOptions

# As LLaVA 1.5 has it: contents are lists of parts.
LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }};{% endfor %}"
    "{% endfor %}"
)
PLAIN = "{% for message in messages %}{{ message['role'].upper() }}: {{ message['content'] }};{% endfor %}"
CHAT: Any = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}


def loaded(folder: Path, content: Any) -> PreTrainedTokenizerBase:
    (folder / "chat_template.json").write_text(json.dumps(content))
    return load_tokenizer(folder, LoadingOptions.build({}))


@pytest.mark.parametrize("template", [LLAVA, PLAIN])
def test_a_template_of_the_processor_is_read(tmp_path, tiny_tokenizer, template):
    tiny_tokenizer.save_pretrained(tmp_path)
    assert render(CHAT, loaded(tmp_path, {"chat_template": template})) == "USER: Who?;ASSISTANT: Me.;"


def test_the_tokenizers_own_template_comes_first(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert render(CHAT, loaded(tmp_path, {"chat_template": PLAIN})) == "Who?"


@pytest.mark.parametrize("content", [{}, {"chat_template": 3}])
def test_a_file_without_template_is_named(tmp_path, tiny_tokenizer, content):
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"chat_template\.json: its chat_template is (None|3), and not a template"):
        loaded(tmp_path, content)
