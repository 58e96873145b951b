"""Records as token ids. The tiny tokenizer has one token per character, BOS (1) in front, EOS (2) on request."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spp.data.tokens import cut, documents, encode, join, render, with_end
from spp.errors import UsageError

BOS, EOS = 1, 2
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}


@pytest.fixture
def chat_tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def endless_tokenizer(tiny_tokenizer):
    """A tokenizer without an end-of-text token, as the char-level OPT has."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    return tokenizer


def characters(tokenizer, text: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(text))


def test_documents_are_each_encoded_with_their_special_tokens(tiny_tokenizer):
    ids = documents([{"text": "ab"}, {"text": ""}, {"text": "c"}], tiny_tokenizer)
    a, b, c = characters(tiny_tokenizer, "abc")
    assert ids == [[BOS, a, b], [BOS], [BOS, c]]


def test_prompt_and_completion_are_one_text(tiny_tokenizer):
    assert render({"prompt": "1+1=", "completion": "2"}, tiny_tokenizer) == "1+1=2"


def test_a_chat_template_writes_its_own_special_tokens(chat_tokenizer):
    assert render(CHAT, chat_tokenizer) == "<user>Hi<eos><assistant>Yo<eos>"
    user, assistant = (characters(chat_tokenizer, text) for text in ("<user>Hi", "<assistant>Yo"))
    assert documents([CHAT], chat_tokenizer) == [[*user, EOS, *assistant, EOS]]


def test_messages_without_a_template_are_refused(tiny_tokenizer):
    with pytest.raises(UsageError, match="has messages, but the model's tokenizer has no chat template"):
        documents([CHAT], tiny_tokenizer)


def test_messages_that_the_template_refuses_are_an_error(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UsageError, match="roles user, assistant: System role not supported"):
        render(CHAT, chat_tokenizer)


def test_many_texts_are_encoded_in_order(tiny_tokenizer):
    texts = [str(number) for number in range(2345)]
    ids = encode(texts, tiny_tokenizer, special=False)
    assert ["".join(tiny_tokenizer.convert_ids_to_tokens(one)) for one in ids] == texts


def test_a_long_text_is_encoded_whole_and_without_a_warning(tiny_tokenizer, caplog):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.model_max_length = 8
    assert [len(one) for one in encode(["x" * 100], tokenizer)] == [101]
    assert not caplog.records


def test_documents_are_joined_with_one_end_of_text_token_each(tiny_tokenizer, endless_tokenizer):
    pieces = [[5, 6], [7, EOS], []]
    assert join(pieces, tiny_tokenizer) == [5, 6, EOS, 7, EOS, EOS]
    assert join(pieces, endless_tokenizer) == [5, 6, 7, EOS]


@given(st.lists(st.integers(0, 5), max_size=6))
def test_the_end_is_added_once(tiny_tokenizer, ids):
    closed = with_end(ids, tiny_tokenizer)
    assert closed[-1] == EOS
    assert with_end(closed, tiny_tokenizer) == closed
    assert closed[: len(ids)] == ids
    assert len(closed) <= len(ids) + 1


@given(ids=st.lists(st.integers(0, 95)), window=st.integers(1, 9))
def test_windows_hold_every_token_in_order(ids, window):
    windows = cut(ids, window)
    assert [token for one in windows for token in one] == ids
    assert all(len(one) == window for one in windows[:-1])
    assert all(1 <= len(one) <= window for one in windows)
