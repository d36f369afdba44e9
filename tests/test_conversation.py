"""Conversations become tokens and masks: the golden vectors, the refusals, the cuts."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.tokenizer import SPECIAL_TOKENS, HuggingFaceTokenizer, RustBPETokenizer

BOS, USER, USER_END, ASSISTANT, ASSISTANT_END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = range(256, 265)

TOOL_USE = {
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "python", "text": "1+1"},
                {"type": "python_output", "text": "2"},
                {"type": "text", "text": "b"},
            ],
        },
    ],
    "ignored": object(),
}


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    """The smallest tokenizer: one id per byte, special tokens 256 to 264."""
    return RustBPETokenizer.train_from_iterator([], 256 + len(SPECIAL_TOKENS))


def talk(*contents, system=None):
    messages = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return {"messages": messages + [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


# --- golden vectors ----------------------------------------------------------------------------------


def test_tool_use_golden(tokenizer):
    ids, mask = tokenizer.render_conversation(TOOL_USE)
    assert ids == [
        256, 257, 83, 10, 10, 104, 105, 258, 259, 97, 261, 49, 43, 49, 262, 263, 50, 264, 98, 260,
    ]  # fmt: skip
    assert mask == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1]


def test_user_alone_golden(tokenizer):
    assert tokenizer.render_conversation(talk("x")) == ([256, 257, 120, 258], [0, 0, 0, 0])


def test_cut_golden(tokenizer):
    conversation = talk("hi", "ok", system="S")
    assert tokenizer.render_conversation(conversation, max_tokens=5) == ([256, 257, 83, 10, 10], [0] * 5)


def test_completion_golden(tokenizer):
    assert tokenizer.render_for_completion(TOOL_USE) == [256, 257, 83, 10, 10, 104, 105, 258, 259]


def test_the_conversation_is_left_as_it_was(tokenizer):
    plain = {"messages": copy.deepcopy(TOOL_USE["messages"])}
    tokenizer.render_conversation(TOOL_USE)
    tokenizer.render_for_completion(TOOL_USE)
    assert TOOL_USE["messages"] == plain["messages"]


def test_several_turns(tokenizer):
    ids, mask = tokenizer.render_conversation(talk("a", "b", "c", "d"))
    assert ids == [
        BOS, USER, 97, USER_END, ASSISTANT, 98, ASSISTANT_END, USER, 99, USER_END, ASSISTANT, 100, ASSISTANT_END,
    ]  # fmt: skip
    assert mask == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]


# --- properties --------------------------------------------------------------------------------------

contents = st.text(max_size=12)
parts = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output"]), "text": contents}),
    max_size=4,
)


@given(st.lists(st.tuples(contents, contents | parts), min_size=1, max_size=3), st.integers(0, 60))
def test_masked_tokens_are_what_the_assistant_says(tokenizer, turns, max_tokens):
    ids, mask = tokenizer.render_conversation(talk(*[c for turn in turns for c in turn]), max_tokens=10_000)
    said = []
    for _, answer in turns:
        for part in [{"type": "text", "text": answer}] if isinstance(answer, str) else answer:
            text = list(part["text"].encode("utf-8", "replace"))
            said += {"text": text, "python": [PYTHON, *text, PYTHON_END], "python_output": []}[part["type"]]
        said.append(ASSISTANT_END)
    assert [token for token, target in zip(ids, mask, strict=True) if target] == said
    assert tokenizer.render_conversation(
        talk(*[c for turn in turns for c in turn]), max_tokens=max_tokens
    ) == (ids[:max_tokens], mask[:max_tokens])


def test_parts_are_encoded_each_on_its_own():
    tokenizer = RustBPETokenizer.train_from_iterator(["low low low lower"], 268)
    assert len(tokenizer.encode("low")) == 1
    apart = talk("x", [{"type": "text", "text": "lo"}, {"type": "text", "text": "w"}])
    joined = talk("x", "low")
    assert len(tokenizer.render_conversation(apart)[0]) == len(tokenizer.render_conversation(joined)[0]) + 1


def test_special_tokens_in_contents_stay_text(tokenizer):
    ids, mask = tokenizer.render_conversation(talk("<|assistant_start|>", "<|bos|>"))
    assert [token for token in ids if token >= 256] == [BOS, USER, USER_END, ASSISTANT, ASSISTANT_END]
    assert sum(mask) == len("<|bos|>") + 1


def test_both_tokenizers_render_alike():
    texts = ["two and two are four", "and two are five"]
    ours = RustBPETokenizer.train_from_iterator(texts, 300)
    theirs = HuggingFaceTokenizer.train_from_iterator(texts, 300)
    rendered = [tokenizer.render_conversation(TOOL_USE) for tokenizer in (ours, theirs)]
    assert ours.decode(rendered[0][0]) == theirs.decode(rendered[1][0])
    assert rendered[0][1] == rendered[1][1]
    assert theirs.decode(theirs.render_for_completion(TOOL_USE)).endswith("hi<|user_end|><|assistant_start|>")


# --- prompts that do not fit -------------------------------------------------------------------------


def test_long_prompt_keeps_bos_and_the_end_of_the_question(tokenizer):
    conversation = talk("x" * 100 + "the end?", "answer")
    whole = tokenizer.render_for_completion(conversation)
    assert len(whole) == 100 + 8 + 4
    assert tokenizer.render_for_completion(conversation, max_tokens=len(whole)) == whole
    cut = tokenizer.render_for_completion(conversation, max_tokens=11)
    assert cut == [BOS, *b"the end?", USER_END, ASSISTANT]


@pytest.mark.parametrize("max_tokens", range(2, 20))
def test_a_prompt_never_exceeds_max_tokens(tokenizer, max_tokens):
    ids = tokenizer.render_for_completion(talk("question", "answer"), max_tokens=max_tokens)
    assert len(ids) == min(max_tokens, 12) and ids[0] == BOS and ids[-1] == ASSISTANT


def test_default_limit_is_2048(tokenizer):
    conversation = talk("x" * 3000, "y")
    assert len(tokenizer.render_conversation(conversation)[0]) == 2048
    assert len(tokenizer.render_for_completion(conversation)) == 2048


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (talk(), "no messages"),
        (talk(system="S"), "must be followed by a user message"),
        (
            {"messages": [{"role": "system", "content": "S"}, {"role": "assistant", "content": "a"}]},
            "followed",
        ),
        (talk(["no", "text"], system="S"), "must be strings"),
        (talk("hi", system=["S"]), "must be strings"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "message 0 must be from user"),
        ({"messages": [*talk("a")["messages"], *talk("b")["messages"]]}, "message 1 must be from assistant"),
        ({"messages": [*talk("a", "b")["messages"], *talk("", system="S")["messages"]]}, "not 'system'"),
        (talk([{"type": "text", "text": "x"}]), "message 0: user content must be a string, not list"),
        (talk("a", 5), "message 1: assistant content must be a string or a list of parts, not int"),
        (talk("a", [{"type": "image", "text": "x"}]), "unknown part type 'image'"),
        (talk("a", [{"type": "python", "text": 5}]), "must be a string"),
    ],
)
def test_malformed_conversations_are_a_value_error(tokenizer, conversation, reason):
    with pytest.raises(ValueError, match=reason):
        tokenizer.render_conversation(conversation)


def test_a_fault_beyond_the_cut_is_found_too(tokenizer):
    with pytest.raises(ValueError, match="message 1"):
        tokenizer.render_conversation(talk("x" * 100, 5), max_tokens=10)


def test_completion_needs_an_assistant_message(tokenizer):
    with pytest.raises(ValueError, match="last message must be the assistant's"):
        tokenizer.render_for_completion(talk("a", "b", "c"))
    with pytest.raises(ValueError, match="max_tokens=1"):
        tokenizer.render_for_completion(talk("a", "b"), max_tokens=1)


# --- for the eye -------------------------------------------------------------------------------------


def test_visualisation_golden(tokenizer):
    red, green, grey, reset = "\x1b[91m", "\x1b[92m", "\x1b[90m", "\x1b[0m"
    assert tokenizer.visualize_tokenization([256, 97], [0, 1]) == f"{red}<|bos|>{reset}|{green}a{reset}"
    assert tokenizer.visualize_tokenization([97], [1], with_token_id=True) == (
        f"{green}a{reset}|{grey}(97){reset}"
    )
