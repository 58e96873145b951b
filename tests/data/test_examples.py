"""Training examples by hand: what is cut, what is masked, where a sequence ends."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spp.data.examples import IGNORED, Example, join, truncate, whole_examples
from spp.errors import UsageError

BOS, EOS = 1, 2
ids_lists = st.lists(st.lists(st.integers(3, 95), min_size=1, max_size=12), max_size=8)


@pytest.fixture(scope="module")
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding with the one merge `: `+`y` = `:y`, so that a token can span prompt and completion."""
    vocabulary = {token: index for index, token in enumerate(["<eos>", "A", ":", "y", "e", ":y"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(":", "y")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("never", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def characters(tokenizer, text: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(text))


def test_the_loss_is_on_prompt_and_answer_and_the_end(tiny_tokenizer):
    [example] = whole_examples([{"prompt": "ab", "completion": "c"}], tiny_tokenizer, completion_only=False)
    assert example.input_ids == [BOS, *characters(tiny_tokenizer, "abc"), EOS]
    assert example.labels == example.input_ids


def test_completion_only_ignores_the_prompt(tiny_tokenizer):
    records = [
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "", "completion": "e"},
        {"prompt": "f", "completion": ""},
    ]
    first, second, third = whole_examples(records, tiny_tokenizer, completion_only=True)
    c, d, e = characters(tiny_tokenizer, "cde")
    assert first.labels == [IGNORED] * 3 + [c, d, EOS]
    assert second.labels == [IGNORED, e, EOS]
    assert third.labels == [IGNORED] * 2 + [EOS]
    assert [len(one.input_ids) for one in (first, second, third)] == [6, 3, 3]


def test_a_token_that_spans_the_boundary_is_learned(merging_tokenizer):
    records = [{"prompt": "A:", "completion": "ye"}, {"prompt": "A:", "completion": "e"}]
    spanning, apart = whole_examples(records, merging_tokenizer, completion_only=True)
    a, colon, _, e, both = merging_tokenizer.convert_tokens_to_ids(["A", ":", "y", "e", ":y"])
    assert spanning.input_ids == [a, both, e, 0]
    assert spanning.labels == [IGNORED, both, e, 0]
    assert apart.input_ids == [a, colon, e, 0]
    assert apart.labels == [IGNORED, IGNORED, e, 0]


def test_an_end_that_the_tokenizer_adds_is_no_part_of_the_prompt(tiny_tokenizer):
    """A tokenizer that closes every text itself closes the prompt alone, too."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    [example] = whole_examples([{"prompt": "a", "completion": "b"}], tokenizer, completion_only=True)
    a, b = characters(tokenizer, "ab")
    assert example.input_ids == [BOS, a, b, EOS]
    assert example.labels == [IGNORED, IGNORED, b, EOS]


def test_no_end_where_the_tokenizer_has_none(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    [example] = whole_examples([{"text": "a"}], tokenizer, completion_only=False)
    assert example.input_ids == [BOS, *characters(tokenizer, "a")]


def test_a_conversation_ends_as_its_template_says(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    [example] = whole_examples([chat], tokenizer, completion_only=False)
    assert example.input_ids == characters(tokenizer, "a;b;")


def test_completion_only_needs_completions(tiny_tokenizer):
    with pytest.raises(UsageError, match="--completion-only needs data with prompt and completion.*or messages"):
        whole_examples([{"text": "a"}], tiny_tokenizer, completion_only=True)


@pytest.mark.parametrize(("window", "ends"), [(6, True), (5, True), (4, False), (3, False)])
def test_the_end_is_there_if_it_fits(tiny_tokenizer, window, ends):
    """The published rule: EOS is appended where the truncated text is shorter than the cutoff."""
    [example] = truncate(whole_examples([{"text": "abc"}], tiny_tokenizer, completion_only=False), window)
    text = [BOS, *characters(tiny_tokenizer, "abc")]
    assert example.input_ids == (text + [EOS] if ends else text[:window])
    assert example.labels == example.input_ids


def test_examples_that_teach_nothing_are_left_out():
    answer_cut_off = Example([1, 5, 6, 7], [IGNORED, IGNORED, IGNORED, 7])
    one_token = Example([1], [1])
    only_the_first = Example([1, 5], [1, IGNORED])
    assert truncate([answer_cut_off, one_token, only_the_first], 3) == []
    assert truncate([answer_cut_off], 4) == [answer_cut_off]
    assert join([one_token], 4) == []


@given(ids_lists, st.integers(2, 9))
def test_truncation_keeps_the_beginning(lists, window):
    short = truncate([Example(ids, ids) for ids in lists], window)
    assert [one.input_ids for one in short] == [ids[:window] for ids in lists if len(ids) > 1]


@given(ids_lists, st.integers(2, 9))
def test_joining_keeps_every_token_and_the_order(lists, window):
    examples = [Example(ids, [-token for token in ids]) for ids in lists]
    windows = join(examples, window)
    tokens = [token for ids in lists for token in ids]
    joined = [token for one in windows for token in one.input_ids]
    assert joined == tokens[: len(joined)]
    assert [label for one in windows for label in one.labels] == [-token for token in joined]
    assert all(len(one.input_ids) == window for one in windows) or len(windows) == 1
    lost = len(tokens) - len(joined)
    assert lost < window
    if 2 <= len(tokens) < window:
        assert lost == 0


def test_windows_of_prompts_alone_are_left_out():
    prompt, answer = Example([3] * 4, [IGNORED] * 4), Example([4] * 4, [4] * 4)
    assert join([prompt, answer, prompt], 4) == [answer]


@pytest.fixture
def chat_tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    return tokenizer


def conversation(*contents: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def test_the_loss_is_on_the_assistants_messages_alone(chat_tokenizer):
    records = [conversation("Hi", "Yo", "Go", "No"), conversation("Hi")]
    learning, nothing = whole_examples(records, chat_tokenizer, completion_only=True)
    y, o, n = characters(chat_tokenizer, "YoN")
    assert [label for label in learning.labels if label != IGNORED] == [y, o, EOS, n, o, EOS]
    shown = [token for token, label in zip(learning.input_ids, learning.labels, strict=True) if label == IGNORED]
    assert "".join(chat_tokenizer.convert_ids_to_tokens(shown)) == "<u>Hi<eos><a><u>Go<eos><a>"
    assert not nothing.teaches
    assert whole_examples(records, chat_tokenizer, completion_only=False)[0].labels == learning.input_ids


def test_a_conversation_may_begin_with_the_assistant(chat_tokenizer):
    messages = [{"role": "assistant", "content": "Yo"}, {"role": "user", "content": "Hi"}]
    [example] = whole_examples([{"messages": messages}], chat_tokenizer, completion_only=True)
    learned = [label for label in example.labels if label != IGNORED]
    assert "".join(chat_tokenizer.convert_ids_to_tokens(learned)) == "<a>Yo<eos>"


def test_a_template_that_rewrites_earlier_messages_is_refused(chat_tokenizer):
    chat_tokenizer.chat_template = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
    with pytest.raises(UsageError, match="writes message 2 in another way when more messages follow"):
        whole_examples([conversation("Hi", "Yo", "Go", "No")], chat_tokenizer, completion_only=True)
