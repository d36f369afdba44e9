"""What a reader sees of generated ids: stop strings, special tokens, and the raw view of both."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.answer_parts import PartsDecoder
from tests.toy_model import ByteTokenizer, answer_text

TOKENIZER = ByteTokenizer()


def ids(*pieces: str) -> list[int]:
    """Text and names of special tokens as ids."""
    special = TOKENIZER.get_special_tokens()
    return [
        t for p in pieces for t in ([TOKENIZER.encode_special(p)] if p in special else TOKENIZER.encode(p))
    ]


CALL = ids(
    "so ", "<|python_start|>", "1+1", "<|python_end|>", "<|output_start|>", "2", "<|output_end|>", " it is 2."
)


def test_stop_strings_are_found_in_text_alone():
    assert answer_text(TOKENIZER, CALL, ["1+1", "zz"]) == "so  it is 2."
    assert answer_text(TOKENIZER, CALL, ["2"]) == "so  it is "
    assert answer_text(TOKENIZER, CALL, [" it is", "2."]) == "so "
    assert answer_text(TOKENIZER, CALL, ["<|python_start|>"]) == "so  it is 2."
    assert answer_text(TOKENIZER, CALL, ["  "]) == "so  it is 2.", "not across a call"
    assert answer_text(TOKENIZER, ids("ab", "<|user_end|>", "cd"), ["bc"]) == "abcd"
    assert answer_text(TOKENIZER, ids("ab", "<|user_end|>", "cd"), ["c"]) == "ab"


def test_the_first_stop_string_counts_and_what_is_held_comes_out():
    decoder = PartsDecoder(TOKENIZER, ["stop", "top it"])
    shown = [delta.text for token in ids("a st", "op") for delta in decoder.push(token)]
    assert "".join(shown) == "a " and decoder.stopped and decoder.push(65) == [] == decoder.flush()
    decoder = PartsDecoder(TOKENIZER, ["stop"])
    assert [d.text for token in ids("a sto") for d in decoder.push(token)] == ["a", " "]
    assert [d.text for d in decoder.flush()] == ["sto"] and not decoder.stopped


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(["<|python_start|>", "<|python_end|>", "<|output_end|>", "a", "b", "ab", "é"]),
        max_size=12,
    ),
    st.lists(st.sampled_from(["a", "ab", "ba", "éa", "bb"]), max_size=2),
)
def test_the_raw_view_stops_at_the_same_token(pieces, stop):
    plain, raw = PartsDecoder(TOKENIZER, stop), PartsDecoder(TOKENIZER, stop, raw=True)
    for token in ids(*pieces):
        plain.push(token)
        raw.push(token)
        assert plain.stopped == raw.stopped
    raw.flush()
    assert plain.stopped or raw.response == "".join(pieces)
