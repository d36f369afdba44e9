"""The crate gives what slow and independent implementations give, on every kind of text."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe
from rustbpe import GPT4_PATTERN, NANOCHAT_PATTERN
from tests.bpe_reference import (
    as_tiktoken,
    assigned_characters,
    corpus,
    learned,
    pieces,
    random_texts,
    slow_ids,
    slow_merges,
)


@pytest.fixture(scope="module")
def trained() -> rustbpe.Tokenizer:
    return learned(corpus(0), 500)[0]


@pytest.fixture(scope="module")
def texts() -> Sequence[str]:
    return list(random_texts(0, 1500, assigned_characters()))


# --- learning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_ties_go_to_the_smallest_pair(seed: int) -> None:
    draw = random.Random(seed)
    alphabet = draw.choice(["ab", "abc", "abcdefgh", "a\xe9\u65e5"])
    words = ["".join(draw.choices(alphabet, k=draw.randrange(1, 12))) for _ in range(40)]
    texts = [" ".join(words[start : start + 5]) for start in range(0, 40, 5)]
    # Letters only, so a piece is a word with the blank before it, if there is one.
    pieces = Counter((" " * (at % 5 > 0) + word).encode() for at, word in enumerate(words))
    _, found = learned(texts, 340, buffer_size=draw.randrange(1, 10), num_threads=draw.randrange(1, 4))
    assert found == slow_merges(pieces, 84)


@pytest.mark.parametrize("seed", range(8))
def test_merges_of_random_unicode_equal_the_definition(seed: int, texts: Sequence[str]) -> None:
    some = texts[seed * 40 : seed * 40 + 40]
    words = Counter(piece for text in some for piece in pieces(text))
    assert learned(list(some), 316)[1] == slow_merges(words, 60)


@given(st.lists(st.text(max_size=80), max_size=8), st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_order_buffers_and_threads_do_not_matter(
    texts: list[str], buffer_size: int, num_threads: int
) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    expected = learned(texts, 300)[1]
    assert learned(texts[::-1], 300, buffer_size=buffer_size, num_threads=num_threads)[1] == expected


# --- encoding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [NANOCHAT_PATTERN, GPT4_PATTERN])
def test_ids_of_random_unicode_equal_the_definition(
    trained: rustbpe.Tokenizer, texts: Sequence[str], pattern: str
) -> None:
    tokenizer = rustbpe.Tokenizer.from_ranks(trained.get_mergeable_ranks(), pattern)
    ranks = dict(trained.get_mergeable_ranks())
    rows = [[id for piece in pieces(text, pattern) for id in slow_ids(ranks, piece)] for text in texts]
    assert [tokenizer.encode_ordinary(text) for text in texts] == rows
    ids, _ = tokenizer.encode_batch_arrays(texts)
    assert ids.tolist() == [id for row in rows for id in row]


@given(
    st.text(
        st.one_of(st.characters(), st.sampled_from(" \n\r\t'sSdmtlLvVrReE09a\u017f\u3000\x85")), max_size=200
    )
)
@settings(max_examples=300, deadline=None)
def test_ids_equal_tiktoken(trained: rustbpe.Tokenizer, text: str) -> None:
    assert trained.encode_ordinary(text) == as_tiktoken(trained).encode_ordinary(text)


@pytest.mark.parametrize(
    "text", ["a" * 20000, "ab" * 10000, "\xe9" * 9999, " " * 5000 + "x", "\n" * 5000, "!" * 9999, "7" * 999]
)
def test_long_runs_equal_tiktoken(trained: rustbpe.Tokenizer, text: str) -> None:
    tokenizer = learned([text[:2000], text[:777]], 290)[0]
    for one in (trained, tokenizer):
        assert one.encode(text) == as_tiktoken(one).encode_ordinary(text)


@pytest.mark.parametrize("shape", ["{}a", "a{}b ", " {}!", "'{}7"])
def test_every_scalar_value_equals_tiktoken(trained: rustbpe.Tokenizer, shape: str) -> None:
    assert_every_scalar_equals_tiktoken(trained, shape)


def test_every_scalar_value_with_the_other_pattern(trained: rustbpe.Tokenizer) -> None:
    tokenizer = rustbpe.Tokenizer.from_ranks(trained.get_mergeable_ranks(), GPT4_PATTERN)
    assert_every_scalar_equals_tiktoken(tokenizer, "7{}a' {}")


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["{}", "a{}", "7{}", "{}'s", "!{}", "\n{}", "{}\n", " {}", "{} ", "{}{}"])
def test_every_scalar_value_in_further_positions(trained: rustbpe.Tokenizer, shape: str) -> None:
    assert_every_scalar_equals_tiktoken(trained, shape)


def assert_every_scalar_equals_tiktoken(trained: rustbpe.Tokenizer, shape: str) -> None:
    scalars = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    text = "".join(shape.replace("{}", scalar) for scalar in scalars)
    assert trained.encode(text) == as_tiktoken(trained, trained.get_pattern()).encode_ordinary(text)
