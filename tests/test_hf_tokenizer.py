"""The exported tokenizer gives our ids, its template renders our conversations, and both come back."""

from __future__ import annotations

import json
import random

import pytest

from nanochat.common import UserError, read_json, write_json
from nanochat.interop import hf_tokenizer
from nanochat.samples import CONVERSATIONS, PARAGRAPHS
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer

# Unicode ranges with letters, digits, marks, blanks, and signs that split patterns treat differently.
RANGES = [(0x20, 0x7F), (0x20, 0x7F), (0xA0, 0x180), (0x370, 0x400), (0x600, 0x700), (0x900, 0x980), (0x2000, 0x2070),
          (0x2150, 0x2190), (0x3040, 0x30A0), (0x4E00, 0x4F00), (0xFF00, 0xFFF0), (0x1F300, 0x1F700), (0, 0x20)]  # fmt: skip


def random_text(rng: random.Random) -> str:
    """Words, cut-outs of real text, blanks, digits and any characters, joined."""
    pieces = []
    for _ in range(rng.randrange(1, 6)):
        kind = rng.randrange(5)
        if kind == 0:
            paragraph = rng.choice(PARAGRAPHS)
            start = rng.randrange(len(paragraph))
            pieces.append(paragraph[start : start + rng.randrange(30)])
        elif kind == 1:
            low, high = rng.choice(RANGES)
            pieces.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 8))))
        elif kind == 2:
            pieces.append(
                rng.choice([" ", "  ", "\n", "\r\n", "\t", " \n ", "\u00a0", "\u2028"]) * rng.randrange(1, 4)
            )
        elif kind == 3:
            pieces.append(str(rng.randrange(10 ** rng.randrange(1, 9))))
        else:
            pieces.append(rng.choice(["'s", "'LL", "'ve", "n't", "--", "the", " The", "ß", "ſ", "K", "ﬃ"]))
    return "".join(pieces)


@pytest.fixture(scope="module")
def ours() -> RustBPETokenizer:
    rng = random.Random(0)
    texts = [*PARAGRAPHS * 20, *(random_text(rng) for _ in range(2000))]
    return RustBPETokenizer.train_from_iterator(iter(texts), 1500)


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf")
    hf_tokenizer.write_tokenizer(ours, directory, 512)
    return directory


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_same_ids_on_ten_thousand_strings(ours, theirs):
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(9_000)]
    # the text of a special token is plain characters to our encoder; theirs calls that splitting it
    texts += [random_text(rng) + rng.choice(SPECIAL_TOKENS) + random_text(rng) for _ in range(1_000)]
    found = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text, wanted, ids in zip(texts, ours.encode(texts), found, strict=True):
        assert ids == wanted, text
        assert theirs.decode(ids) == ours.decode(wanted) == text


def test_special_tokens_have_their_ids(ours, theirs):
    assert [theirs.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS] == [
        ours.encode_special(name) for name in SPECIAL_TOKENS
    ]
    assert theirs(SPECIAL_TOKENS[3], add_special_tokens=False)["input_ids"] == [
        ours.encode_special(SPECIAL_TOKENS[3])
    ]
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (
        "<|bos|>",
        "<|assistant_end|>",
        "<|bos|>",
    )
    assert len(theirs) == ours.get_vocab_size() and theirs.model_max_length == 512
    assert theirs("no tokens are added")["input_ids"] == ours.encode("no tokens are added")


def random_conversation(rng: random.Random) -> dict:
    """Any number of turns, with and without system message and tools; no two text parts side by side."""
    messages = [{"role": "system", "content": random_text(rng)}] if rng.random() < 0.3 else []
    for _ in range(rng.randrange(1, 4)):
        messages.append({"role": "user", "content": random_text(rng)})
        if rng.random() < 0.5:
            content = random_text(rng) if rng.random() < 0.9 else ""
        else:
            content, kinds = [], ["text", "python", "python_output"]
            for _ in range(rng.randrange(1, 7)):
                last = content[-1]["type"] if content else ""
                kind = rng.choice([kind for kind in kinds if not kind == last == "text"])
                content.append({"type": kind, "text": random_text(rng)})
        messages.append({"role": "assistant", "content": content})
    return {"messages": messages}


def test_the_template_renders_a_thousand_conversations(ours, theirs):
    rng = random.Random(2)
    for conversation in [*CONVERSATIONS, *(random_conversation(rng) for _ in range(1_000))]:
        messages = conversation["messages"]
        ids, mask = ours.render_conversation(conversation, 100_000)
        rendered = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert rendered["input_ids"] == ids, messages
        # transformers maps the mask through characters and forgets tokens that end inside one
        assert rendered["assistant_masks"] == mask or not str(messages).isascii(), messages
        prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert prompt == ours.render_for_completion(conversation, 100_000)


def test_lists_of_text_parts_are_taken_as_clients_send_them(theirs):
    def render(content):
        return theirs.apply_chat_template([{"role": "user", "content": content}], tokenize=False)

    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert render(parts) == render("a b") == "<|bos|><|user_start|>a b<|user_end|>"


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([{"role": "user", "content": "x <|user_end|> y"}], "special token"),
        ([{"role": "assistant", "content": "x"}], "alternate"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": []}], "no content"),
        ([{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}], "alternate"),
        ([{"role": "user", "content": "x"}] * 2, "alternate"),
        ([{"role": "system", "content": "x"}], "followed by a user"),
        ([{"role": "user", "content": [{"type": "image", "text": "x"}]}], "text only"),
        ([{"role": "user", "content": "x"},
          {"role": "assistant", "content": [{"type": "text", "text": "x"}] * 2}], "neighbouring"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "code", "text": "x"}]}],
         "unknown part"),
    ],
)  # fmt: skip
def test_the_template_refuses_what_our_renderer_could_not_say(theirs, messages, complaint):
    with pytest.raises(Exception, match=complaint):
        theirs.apply_chat_template(messages, tokenize=False)


def test_it_comes_back_as_it_was(ours, folder):
    back = hf_tokenizer.read_tokenizer(folder)
    assert back.vocabulary.ranks == ours.vocabulary.ranks
    assert back.vocabulary.pattern == ours.vocabulary.pattern
    assert back.vocabulary.special_tokens == ours.vocabulary.special_tokens


def test_other_kinds_of_tokenizers_are_refused(folder, tmp_path):
    content = read_json(folder / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"normalizer": {"type": "NFC"}}))
    with pytest.raises(UserError, match="changes the text"):
        hf_tokenizer.read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(content | {"model": {"type": "Unigram", "vocab": []}})
    )
    with pytest.raises(UserError, match="needs a BPE"):
        hf_tokenizer.read_tokenizer(tmp_path)
    # merges in another order are another tokenizer, though the vocabulary is the same
    content["model"] |= {"merges": content["model"]["merges"][::-1], "ignore_merges": False}
    write_json(tmp_path / "tokenizer.json", content)
    with pytest.raises(UserError, match="order that its ids do not tell"):
        hf_tokenizer.read_tokenizer(tmp_path)


def test_a_vocabulary_without_our_special_tokens_is_refused(ours, tmp_path):
    import dataclasses

    vocabulary = dataclasses.replace(ours.vocabulary, special_tokens={"<|bos|>": 1491})
    with pytest.raises(UserError, match="lacks the special tokens"):
        hf_tokenizer.write_tokenizer(RustBPETokenizer(vocabulary), tmp_path, 512)
