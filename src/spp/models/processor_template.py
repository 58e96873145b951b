"""The chat template of a vision model's processor, in a file of its own that tokenizers do not read."""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from spp.checkpoints.json_files import read_object
from spp.errors import UsageError, shown

_FILE, _KEY = "chat_template.json", "chat_template"
_PROBE = "spp probe"

# Processors' templates look for parts of the type text, and pass over a content that is a string.
_IN_PARTS = (
    "{%- set ours = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}"
    "{%- set ours.messages = ours.messages + [dict(message, content=parts)] -%}"
    "{%- endfor -%}{%- set messages = ours.messages -%}"
)


def take_processor_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Give a tokenizer without chat template that of the processor beside it, if there is one.

    Raises:
        UsageError: the file holds no template.
    """
    if tokenizer.chat_template or not (folder / _FILE).is_file():
        return
    template = read_object(folder / _FILE).get(_KEY)
    if not isinstance(template, str):
        raise UsageError(f"{folder / _FILE}: its {_KEY} is {shown(template)}, and not a template; correct or remove it")
    tokenizer.chat_template = template
    if not _speaks(tokenizer):
        tokenizer.chat_template = _IN_PARTS + template


def _speaks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes the content of a message that is a string."""
    try:
        return _PROBE in str(tokenizer.apply_chat_template([{"role": "user", "content": _PROBE}], tokenize=False))
    except (TemplateError, TypeError, ValueError):  # it may want other roles; that is said where it is used
        return True
