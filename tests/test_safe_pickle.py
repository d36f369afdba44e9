"""Upstream's pickled tokenizer is read; no pickle runs anything."""

from __future__ import annotations

import os
import pickle

import pytest

from nanochat.common import UserError
from nanochat.safe_pickle import read_tokenizer_pickle
from tests.toy_export import tokenizer


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_tiktoken_encoding_is_read(tmp_path, protocol):
    ours = tokenizer()
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(ours.to_tiktoken(), protocol))
    vocabulary = read_tokenizer_pickle(path)
    assert vocabulary.ranks == ours.vocabulary.ranks
    assert vocabulary.pattern == ours.vocabulary.pattern
    assert vocabulary.special_tokens == ours.vocabulary.special_tokens


class Calls:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (Calls(os.system, "touch pwned"), "asks for"),
        (Calls(eval, "open('pwned', 'w')"), r"builtins\.eval"),
        (Calls(getattr, tokenizer, "__class__"), "asks for"),
        ({"mergeable_ranks": {b"a": 0}}, "holds dict"),
        ([1, 2], "holds list"),
    ],
)
def test_other_pickles_are_refused_and_run_nothing(tmp_path, monkeypatch, content, complaint):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=complaint):
        read_tokenizer_pickle(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.pkl"]


def test_a_hostile_state_inside_the_right_class(tmp_path):
    whole = pickle.dumps(tokenizer().to_tiktoken(), 2)
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a pickled"):
        read_tokenizer_pickle(path)
    path.write_bytes(pickle.dumps("gpt2"))
    with pytest.raises(UserError, match="holds str"):
        read_tokenizer_pickle(path)
    # an Encoding whose ranks are not ranks
    forged = b"\x80\x02ctiktoken.core\nEncoding\n)\x81}(U\x04nameU\x01xU\x07pat_strU\x01xU\x0fmergeable_ranks}U\x01aK\x00sU\x0especial_tokens}U\x01bK\x01sub."
    path.write_bytes(forged)
    with pytest.raises(UserError, match="something else than tokens"):
        read_tokenizer_pickle(path)
    with pytest.raises(UserError, match="cannot read"):
        read_tokenizer_pickle(tmp_path / "absent.pkl")
