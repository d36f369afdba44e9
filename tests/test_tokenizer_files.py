"""Tokenizers to and from the files of others: tokenizer.json gives our ids, a pickle runs nothing."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import tiktoken

from nanochat.common import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, HuggingFaceTokenizer, RustBPETokenizer, get_tokenizer
from nanochat.tokenizer_files import read_tokenizer_json, read_tokenizer_pickle, write_tokenizer_json
from scripts import tok_convert
from tests.bpe_reference import assigned_characters, corpus, random_texts
from tests.test_tokenizer import foreign_encoding


@pytest.fixture(scope="module")
def trained() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(corpus(0), 600)


@pytest.fixture(scope="module")
def foreign() -> RustBPETokenizer:
    return RustBPETokenizer(foreign_encoding(), "<|endoftext|>")


# --- tokenizer.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trained", "foreign"])
def test_tokenizers_gives_the_same_ids(name, tmp_path, request):
    ours = request.getfixturevalue(name)
    write_tokenizer_json(ours.vocabulary, tmp_path / "tokenizer.json")
    theirs = HuggingFaceTokenizer.from_directory(tmp_path)
    for text in [*corpus(1, 100), *random_texts(2, 1500, assigned_characters())]:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids, repr(text)
        assert theirs.decode(ids) == text
    assert theirs.get_vocab_size() == len(ours.vocabulary.ranks) + len(ours.vocabulary.special_tokens)
    for special, token in ours.vocabulary.special_tokens.items():
        assert theirs.encode_special(special) == token


def test_a_vocabulary_that_tokenizer_json_cannot_express(foreign, tmp_path):
    whole_lines = replace(foreign.vocabulary, pattern=".+")
    with pytest.raises(UserError, match="no special token"):
        write_tokenizer_json(whole_lines, tmp_path / "tokenizer.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"), [("\n", "no special token"), ("a", "cannot tell"), ("Ġt", "cannot tell")]
)
def test_special_tokens_that_tokenizer_json_cannot_express(foreign, tmp_path, text, message):
    vocabulary = replace(foreign.vocabulary, special_tokens={text: 300})
    with pytest.raises(UserError, match=message):
        write_tokenizer_json(vocabulary, tmp_path / "tokenizer.json")


def test_special_tokens_of_a_text_are_read_where_asked_for(trained, tmp_path):
    import tokenizers

    write_tokenizer_json(trained.vocabulary, tmp_path / "tokenizer.json")
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "<|bos|><|user_start|> the fox<|user_end|>"
    ids = trained._core.encode(text, allowed_special=set(SPECIAL_TOKENS))
    assert plain.encode(text, add_special_tokens=False).ids == ids


@pytest.mark.parametrize("name", ["trained", "foreign"])
def test_tokenizer_json_comes_back(name, tmp_path, request):
    vocabulary = request.getfixturevalue(name).vocabulary
    write_tokenizer_json(vocabulary, tmp_path / "tokenizer.json")
    again = read_tokenizer_json(tmp_path / "tokenizer.json")
    assert (again.ranks, again.pattern, again.special_tokens) == (
        vocabulary.ranks,
        vocabulary.pattern,
        vocabulary.special_tokens,
    )


def test_a_tokenizer_of_the_library_is_read(tmp_path):
    theirs = HuggingFaceTokenizer.train_from_iterator(corpus(0), 500)
    theirs.save(tmp_path)
    ours = RustBPETokenizer(read_tokenizer_json(tmp_path / "tokenizer.json"))
    for text in corpus(3, 100):
        assert ours.encode(text) == theirs.encode(text)
    assert ours.get_bos_token_id() == theirs.get_bos_token_id() == 0


def edited(path: Path, edit) -> Path:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def _without_merge(content: dict) -> dict:
    """The model of a tokenizer.json, to which a token is added that is only ever a whole piece."""
    content["model"]["vocab"]["qqqq"] = 10_000
    return content["model"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c["model"].update(ignore_merges=False),  # all tokens are merged here
        lambda c: c["model"].pop("ignore_merges"),
        _without_merge,  # whole pieces are looked up
        lambda c: c["model"].update(dropout=0.0, continuing_subword_prefix="", end_of_word_suffix=""),
    ],
)
def test_harmless_differences_are_read(trained, tmp_path, edit):
    write_tokenizer_json(trained.vocabulary, tmp_path / "tokenizer.json")
    ours = RustBPETokenizer(read_tokenizer_json(edited(tmp_path / "tokenizer.json", edit)))
    theirs = HuggingFaceTokenizer.from_directory(tmp_path)
    for text in ["qqqq", *corpus(1, 50)]:
        assert theirs.encode(text) == ours.encode(text)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["model"].update(type="Unigram"), "BPE after"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"].pop(), "BPE after"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True), "second time"),
        (lambda c: c.update(normalizer={"type": "NFC"}), "second time"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(invert=True), "isolated"),
        (lambda c: c.pop("model"), "byte-level BPE"),
        (lambda c: c["model"]["vocab"].pop("a"), "lack the single byte"),
        (lambda c: c["model"]["vocab"].update({"<": 10**9}), "too large"),
        (lambda c: c["model"]["merges"].reverse(), "order"),
        (lambda c: c["model"]["merges"].pop(), "order"),
        (lambda c: c["model"].update(dropout=0.1), "dropout 0.1"),
        (lambda c: c["model"].update(unk_token="a"), "unk_token 'a'"),
        (lambda c: c["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix '##'"),
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix '</w>'"),
        (
            lambda c: c["added_tokens"][3].update(special=False),
            r"\['<\|assistant_start\|>'\] are not special",
        ),
        (lambda c: c["added_tokens"][8].pop("special"), "are not special"),
        (lambda c: _without_merge(c).update(ignore_merges=False), "'qqqq', which no merge gives"),
        (lambda c: _without_merge(c).pop("ignore_merges"), "'qqqq', which no merge gives"),
    ],
)
def test_other_tokenizers_are_refused(trained, tmp_path, edit, message):
    write_tokenizer_json(trained.vocabulary, tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=message):
        read_tokenizer_json(edited(tmp_path / "tokenizer.json", edit))


# --- pickles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_upstreams_pickle_is_read(trained, tmp_path, protocol):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(trained.to_tiktoken(), protocol))
    assert read_tokenizer_pickle(tmp_path / "tokenizer.pkl") == trained.vocabulary


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


class HostileState(dict):
    def __reduce__(self):
        return eval, ("__import__('os').mkdir('made-by-a-pickle')",)


def payloads() -> dict[str, bytes]:
    encoding = tiktoken.Encoding(
        "rustbpe",
        pat_str="a",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={"<|bos|>": 256},
    )
    good = pickle.dumps(encoding)
    state = encoding.__getstate__()

    return {
        "a call": pickle.dumps(Hostile()),
        "a call inside": _object_with({**state, "name": Hostile()}),
        "a call as the state": _object_with(HostileState()),
        "a class": b"ctiktoken.core\nEncoding\n.",
        "a call of the class": b"ctiktoken.core\nEncoding\n(S'x'\ntR.",
        "another class": pickle.dumps(Path("x")),
        "plain data": pickle.dumps({"name": "x"}),
        "a name alone": _object_with("gpt2"),
        "a missing key": _object_with({key: state[key] for key in ("name", "pat_str")}),
        "ids that are no ids": _object_with({**state, "mergeable_ranks": {b"a": "b"}}),
        "true as an id": _object_with({**state, "special_tokens": {"<|bos|>": True}}),
        "negative ids": _object_with({**state, "special_tokens": {"<|bos|>": -1}}),
        "too few ranks": _object_with({**state, "mergeable_ranks": {b"a": 0}}),
        "an id that is taken": _object_with({**state, "special_tokens": {"<|bos|>": 0}}),
        "a broken pattern": _object_with({**state, "pat_str": "("}),
        "the first half": good[: len(good) // 2],
        "nothing": b"",
        "text": b"not a pickle at all",
        "a tower of tuples": b"\x80\x03)" + b"\x85" * 200_000 + b".",
        "a tower of tables": b"\x80\x03"
        + b"}X\x01\x00\x00\x00a" * 200_000
        + b"K\x00"
        + b"s" * 200_000
        + b".",
        "a claim of many values": b"\x80\x03K\x00" + b"r\xff\xff\xff\x7f" + b".",
        "a claim of a huge size": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    }


def _object_with(state: object) -> bytes:
    """A pickle of an object of tiktoken's class with any state."""
    body = pickle.dumps(state, 3)[2:-1]  # without protocol and end
    return b"\x80\x03ctiktoken.core\nEncoding\n)\x81" + body + b"b."


@pytest.mark.parametrize("name", payloads())
def test_hostile_and_damaged_pickles_run_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.pkl").write_bytes(payloads()[name])
    with pytest.raises(UserError, match=r"tokenizer\.pkl"):
        read_tokenizer_pickle(tmp_path / "tokenizer.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.pkl"]


# --- the command -------------------------------------------------------------------------------------


def test_converting_there_and_back(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(trained.to_tiktoken()))
    tok_convert.main(tok_convert.Config(from_pickle=str(tmp_path / "tokenizer.pkl")))
    assert get_tokenizer().vocabulary == trained.vocabulary
    assert "tokens, 9 of them special" in capsys.readouterr().out
    path = str(tmp_path / "tokenizer.json")
    tok_convert.main(tok_convert.Config(to_json=path))
    with pytest.raises(UserError, match="--overwrite"):
        tok_convert.main(tok_convert.Config(from_json=path))
    tok_convert.main(tok_convert.Config(from_json=path, overwrite=True))
    assert get_tokenizer().encode("the fox") == trained.encode("the fox")


def test_what_cannot_be_converted(foreign, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    write_tokenizer_json(foreign.vocabulary, tmp_path / "tokenizer.json")
    for config, message in [
        (tok_convert.Config(), "exactly one"),
        (tok_convert.Config(from_json="a", to_json="b"), "exactly one"),
        (tok_convert.Config(from_pickle=str(tmp_path / "none.pkl")), "cannot read"),
        (tok_convert.Config(from_json=str(tmp_path / "tokenizer.json")), "no special token"),
    ]:
        with pytest.raises(UserError, match=message):
            tok_convert.main(config)
    assert not (tmp_path / "tokenizer").exists()
