"""Tokenizers: encoding options, files, special tokens, interchange with tiktoken, streams."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    HuggingFaceTokenizer,
    RustBPETokenizer,
    StreamingDecoder,
    Vocabulary,
    get_token_bytes,
    get_tokenizer,
)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")

TEXTS = [
    "Hello world's  12345\n\n  I'M x",
    "don't  stop!!!\n ok; 3.14 and 2024\t\tdef f(x):\n    return x\n",
    "今天天气很好。 Привет, мир! שלום नमस्ते a \u3000b",
    "👩🏽\u200d🚀 emoji 👍🏿 and combining e\u0301",
    "aaaa    aaaa" * 20,
]


@pytest.fixture(scope="module")
def smallest() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator([], 265)


@pytest.fixture(scope="module")
def trained() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(TEXTS * 3, 400)


@pytest.fixture(scope="module")
def foreign() -> RustBPETokenizer:
    return RustBPETokenizer(foreign_encoding(), "<|endoftext|>")


@pytest.fixture(scope="module")
def hugging_face() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.train_from_iterator(TEXTS * 3, 400)


# --- encode and decode -------------------------------------------------------------------------------


def test_prepend_and_append_golden(smallest):
    rows = smallest.encode(["a", "", "b"], prepend="<|bos|>", append=257)
    assert rows == [[256, 97, 257], [256, 257], [256, 98, 257]]
    assert smallest.encode("", prepend="<|bos|>") == [256]
    assert smallest("a", append="<|output_end|>") == [97, 264]
    assert smallest.encode([]) == []


@pytest.mark.parametrize("unknown", [-1, 265, 2**40, 2**70])
@pytest.mark.parametrize("name", ["smallest", "hugging_face"])
def test_ids_of_no_token_are_a_value_error(name, unknown, request):
    tokenizer = request.getfixturevalue(name)
    unknown += tokenizer.get_vocab_size() - 265 if unknown == 265 else 0
    for text in ("a", ["a"]):
        for position in ("prepend", "append"):
            with pytest.raises(ValueError, match=f"no token has id {unknown}"):
                tokenizer.encode(text, **{position: unknown})


def test_special_strings_are_plain_text_golden(smallest):
    assert smallest.encode("<|bos|>") == [60, 124, 98, 111, 115, 124, 62]


@pytest.mark.parametrize("wrong", [5, None, b"bytes", ("a", "b"), ["a", 5], {"a": 1}])
def test_other_types_are_a_value_error(smallest, wrong):
    with pytest.raises(ValueError, match="string or a list of strings"):
        smallest.encode(wrong)


@given(st.text())
def test_decode_inverts_encode(trained, text):
    assert trained.decode(trained.encode(text)) == text


@given(st.lists(st.text(), max_size=5), st.sampled_from([None, 1, 8]))
def test_a_list_is_encoded_as_its_texts_are(trained, texts, num_threads):
    rows = trained.encode(texts, prepend="<|bos|>", num_threads=num_threads)
    assert rows == [trained.encode(text, prepend="<|bos|>") for text in texts]
    ids, offsets = trained.encode_arrays(texts, prepend="<|bos|>")
    assert ids.dtype == np.uint16 and offsets.dtype == np.int64
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == rows


@given(st.text() | st.text(st.characters(codec=None, categories=["Cs", "L", "Zs"])))
def test_ids_are_those_of_tiktoken(trained, text):
    assert trained.encode(text) == trained.enc.encode_ordinary(text)


def test_lone_surrogates_become_replacement_characters(trained):
    assert trained.decode(trained.encode("a\ud800b")) == "a\ufffdb"
    assert trained.encode(["ok", "a\ud800b"])[1] == trained.encode("a\ufffdb")


def test_invalid_utf8_is_decoded_with_replacement(smallest):
    assert smallest.decode([0xE4, 0xBB, 97, 256]) == "\ufffda<|bos|>"
    with pytest.raises(ValueError):
        smallest.decode([265])


@needs_shared
def test_real_text_of_many_scripts_survives_and_matches_tiktoken():
    with open(SHARED / "tokenizer_samples" / "multilingual.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"][:400] for line, _ in zip(file, range(400), strict=False)]
    texts.append((SHARED / "tokenizer_samples" / "blns.txt").read_text(encoding="utf-8"))
    texts.append(
        (SHARED / "tokenizer_samples" / "unicode-emoji-test.txt").read_text(encoding="utf-8")[:50_000]
    )
    tokenizer = RustBPETokenizer.train_from_iterator(texts, 2000)
    rows = tokenizer.encode(texts)
    assert rows == tokenizer.enc.encode_ordinary_batch(texts)
    assert [tokenizer.decode(row) for row in rows] == texts


# --- vocabulary --------------------------------------------------------------------------------------


def test_special_tokens_follow_the_learned_ones(trained):
    num_learned = len(trained.vocabulary.ranks)
    assert [trained.encode_special(token) for token in SPECIAL_TOKENS] == list(
        range(num_learned, num_learned + 9)
    )
    assert trained.get_special_tokens() == set(SPECIAL_TOKENS)
    assert trained.get_bos_token_id() == num_learned and trained.get_vocab_size() == num_learned + 9
    with pytest.raises(KeyError):
        trained.encode_special("<|nothing|>")


def test_requested_size_is_the_total(trained):
    assert trained.get_vocab_size() == 400


def test_text_that_runs_out_of_pairs_gives_a_smaller_vocabulary(caplog):
    tokenizer = RustBPETokenizer.train_from_iterator(["ab"], 300)
    assert tokenizer.get_vocab_size() == 266 and tokenizer.get_bos_token_id() == 257
    assert [record.levelname for record in caplog.records if record.name == "rustbpe"] == ["WARNING"]


def test_too_small_a_vocabulary_is_refused_before_reading():
    def texts():
        raise AssertionError("was read")
        yield

    with pytest.raises(ValueError, match="265"):
        RustBPETokenizer.train_from_iterator(texts(), 264)


def test_an_error_of_the_iterator_comes_through():
    def texts():
        yield "some text"
        raise KeyError("shard 7")

    with pytest.raises(KeyError, match="shard 7"):
        RustBPETokenizer.train_from_iterator(texts(), 300)


def test_byte_lengths_add_up_to_the_text(trained):
    lengths = trained.token_bytes_lengths()
    assert lengths.dtype == np.int32 and lengths.shape == (400,)
    special = [trained.encode_special(token) for token in SPECIAL_TOKENS]
    assert np.flatnonzero(lengths == 0).tolist() == special
    assert (lengths[:256] == 1).all()
    for text in TEXTS:
        assert lengths[trained.encode(text, prepend="<|bos|>")].sum() == len(text.encode())


def test_bytes_of_single_tokens(trained):
    assert trained.decode_single_token_bytes(0xFF) == b"\xff" and trained.id_to_token(0xFF) == "\ufffd"
    assert trained.decode_single_token_bytes(trained.get_bos_token_id()) == b"<|bos|>"
    assert b"".join(map(trained.decode_single_token_bytes, trained.encode(TEXTS[2]))) == TEXTS[2].encode()


# --- files -------------------------------------------------------------------------------------------


def test_save_and_load(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    trained.save(tmp_path / "tokenizer")
    assert str(tmp_path / "tokenizer") in capsys.readouterr().out
    loaded = get_tokenizer()
    assert loaded.vocabulary == trained.vocabulary
    assert loaded.encode(TEXTS) == trained.encode(TEXTS)
    token_bytes = get_token_bytes()
    assert str(token_bytes.dtype) == "torch.int32"
    assert token_bytes.tolist() == trained.token_bytes_lengths().tolist()


def test_the_hash_of_a_vocabulary_is_that_of_what_it_does(trained, tmp_path):
    own = trained.vocabulary
    trained.save(tmp_path)
    assert Vocabulary.load(tmp_path).sha256 == own.sha256 == replace(own, name="another").sha256
    (first, a), (second, b) = list(own.ranks.items())[-2:]
    others = [
        replace(own, ranks=own.ranks | {first: b, second: a}),
        replace(own, pattern=r"\S+|\s+"),
        replace(
            own,
            special_tokens=dict(zip(own.special_tokens, reversed(own.special_tokens.values()), strict=True)),
        ),
    ]
    assert len({own.sha256, *(other.sha256 for other in others)}) == 4


def test_the_files_are_plain_text_that_tiktoken_reads(trained, tmp_path):
    from tiktoken.load import load_tiktoken_bpe

    trained.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks.tiktoken", "tokenizer_config.json"]
    assert load_tiktoken_bpe(str(tmp_path / "ranks.tiktoken")) == trained.vocabulary.ranks
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["pattern"] == SPLIT_PATTERN and config["special_tokens"]["<|bos|>"] == 391


def test_missing_tokenizer_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"no tokenizer in .*python -m scripts\.tok_train"):
        get_tokenizer()


def test_damaged_files_are_a_user_error(trained, tmp_path):
    trained.save(tmp_path)
    ranks = (tmp_path / "ranks.tiktoken").read_bytes()
    (tmp_path / "ranks.tiktoken").write_bytes(ranks[:-10])
    with pytest.raises(UserError, match="damaged"):
        get_tokenizer(tmp_path)
    (tmp_path / "ranks.tiktoken").write_bytes(ranks)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(UserError, match="format 99"):
        get_tokenizer(tmp_path)


def test_a_save_that_was_killed_between_its_files_is_noticed(trained, smallest, tmp_path, monkeypatch):
    trained.save(tmp_path)
    monkeypatch.setattr("nanochat.tokenizer.write_json", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        smallest.save(tmp_path)
    with pytest.raises(UserError, match="saving was interrupted"):
        get_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: [], "holds no JSON object"),
        (lambda config: config.pop("pattern") and config, "lacks pattern"),
        (lambda config: config | {"special_tokens": []}, "lacks pattern, special_tokens"),
        (lambda config: config | {"name": 5}, "or name"),
        (lambda config: config.pop("ranks_sha256") and config, "hash"),
        (lambda config: config | {"pattern": "("}, "invalid split pattern"),
        (lambda config: config | {"special_tokens": {}}, r"no special token <\|bos\|>"),
        (lambda config: config | {"special_tokens": {"<|bos|>": "x"}}, "damaged"),
        (lambda config: config | {"special_tokens": {"<|bos|>": -1}}, "cannot have id -1"),
        (lambda config: config | {"special_tokens": {"<|bos|>": 0}}, "occurs twice"),
    ],
)
def test_a_damaged_configuration_is_a_user_error(trained, tmp_path, edit, message):
    trained.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=message):
        get_tokenizer(tmp_path)


@pytest.mark.parametrize("ranks", [b"YQ== 0 Yg==", b"YQ== x", b"a 0", b"YQ== 0"])
def test_ranks_that_are_none_are_a_user_error(trained, tmp_path, ranks):
    trained.save(tmp_path)
    (tmp_path / "ranks.tiktoken").write_bytes(ranks)
    path = tmp_path / "tokenizer_config.json"
    digest = hashlib.sha256(ranks).hexdigest()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ranks_sha256": digest}))
    with pytest.raises(UserError, match="is damaged"):
        get_tokenizer(tmp_path)


@pytest.mark.slow
def test_loading_32k_tokens_is_quick(tmp_path):
    ranks = {bytes([b]): b for b in range(256)}
    for left in ranks.copy():
        ranks.update({left + bytes([right]): len(ranks) + right for right in range(127)})
    RustBPETokenizer(Vocabulary(ranks, SPLIT_PATTERN, {"<|bos|>": len(ranks)})).save(tmp_path)
    seconds = []
    while len(seconds) < 5 or (
        min(seconds) >= 0.05 and len(seconds) < 60
    ):  # a machine can be slow for seconds
        started = time.process_time()
        get_tokenizer(tmp_path)
        seconds.append(time.process_time() - started)
    assert len(ranks) == 32_768 and min(seconds) < 0.05


# --- interchange -------------------------------------------------------------------------------------


def test_tiktoken_encoding_and_back(trained):
    again = RustBPETokenizer(trained.to_tiktoken())
    assert again.vocabulary == trained.vocabulary
    assert trained.enc is trained.enc and trained.enc.n_vocab == trained.get_vocab_size()
    assert trained.enc.encode("a<|bos|>", allowed_special="all")[-1] == trained.get_bos_token_id()


def foreign_encoding() -> tiktoken.Encoding:
    """As GPT-2's: bytes not in order, a gap before the special token, another pattern."""
    order = [*range(33, 127), *range(0, 33), *range(127, 256)]
    ranks = {bytes([byte]): rank for rank, byte in enumerate(order)}
    for token in (b" t", b"he", b" the", b"in", b"er", b"\xc3\xa9"):
        ranks[token] = len(ranks)
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    return tiktoken.Encoding(
        "foreign", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300}
    )


@given(st.text() | st.text(alphabet=" thein'é1\n"))
def test_a_foreign_vocabulary_encodes_as_in_tiktoken(foreign, text):
    assert foreign.encode(text) == foreign.enc.encode_ordinary(text)


def test_from_pretrained_takes_a_tiktoken_encoding_by_name(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"foreign": foreign_encoding()}[name])
    tokenizer = RustBPETokenizer.from_pretrained("foreign")
    assert tokenizer.get_bos_token_id() == 300 and tokenizer.get_vocab_size() == 301
    assert tokenizer.decode(tokenizer.encode("the inner é")) == "the inner é"
    assert tokenizer.token_bytes_lengths()[[0, 258, 290, 300]].tolist() == [1, 4, 0, 0]


# --- streams -----------------------------------------------------------------------------------------


@given(st.text(alphabet="aé今👩🏽\u200d🚀 "))
def test_a_stream_gives_the_same_text_and_never_half_a_character(smallest, text):
    decoder = StreamingDecoder(smallest)
    chunks = [decoder.push(token) for token in smallest.encode(text)]
    assert "".join(chunks) + decoder.flush() == text
    assert not any("\ufffd" in chunk for chunk in chunks)


def test_an_unfinished_character_is_flushed_as_replacement(smallest):
    decoder = StreamingDecoder(smallest)
    assert [decoder.push(token) for token in b"a\xe4\xbb"] == ["a", "", ""]
    assert decoder.flush() == "\ufffd" and decoder.flush() == ""
    assert decoder.push(98) == "b"
    assert decoder.push(0xFF) + decoder.push(99) == "\ufffdc"


# --- the library `tokenizers` ------------------------------------------------------------------------


def test_hugging_face_round_trip_and_special_ids(hugging_face):
    assert [hugging_face.encode_special(token) for token in SPECIAL_TOKENS] == list(range(9))
    assert hugging_face.get_special_tokens() == list(SPECIAL_TOKENS)
    assert hugging_face.encode_special("<|nothing|>") is None
    assert hugging_face.get_bos_token_id() == 0 and hugging_face.get_vocab_size() == 400
    for text in TEXTS:
        ids = hugging_face.encode(text)
        assert hugging_face.decode(ids) == text
        assert b"".join(map(hugging_face.decode_single_token_bytes, ids)) == text.encode()
    assert hugging_face.encode(TEXTS, prepend="<|bos|>") == [[0, *hugging_face.encode(t)] for t in TEXTS]


def test_hugging_face_never_reads_special_tokens_out_of_text(hugging_face):
    assert 0 not in hugging_face.encode("a<|bos|>b")
    assert hugging_face.decode(hugging_face.encode("a<|bos|>b")) == "a<|bos|>b"


def test_hugging_face_save_and_load(hugging_face, tmp_path):
    hugging_face.save(tmp_path)
    loaded = HuggingFaceTokenizer.from_directory(tmp_path)
    assert loaded.encode(TEXTS) == hugging_face.encode(TEXTS)
    assert 0 not in loaded.encode("<|bos|>")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        HuggingFaceTokenizer.from_directory(tmp_path / "nowhere")


def test_hugging_face_names_and_bytes_of_tokens(hugging_face):
    space = hugging_face.encode(" ")[0]
    assert hugging_face.id_to_token(space) == "\u0120"
    assert hugging_face.decode_single_token_bytes(0) == b"<|bos|>"
    every_byte = {hugging_face.decode_single_token_bytes(token) for token in range(9, 265)}
    assert every_byte == {bytes([byte]) for byte in range(256)}


def test_the_pattern_is_the_crates():
    import rustbpe

    assert SPLIT_PATTERN == rustbpe.NANOCHAT_PATTERN


# --- imports -----------------------------------------------------------------------------------------


def test_importing_the_module_loads_none_of_the_libraries():
    code = "import sys, nanochat.tokenizer; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"torch", "tiktoken", "tokenizers", "numpy", "rustbpe"}
    assert not heavy & set(loaded.stdout.split())


def test_a_trained_tokenizer_needs_neither_tiktoken_nor_torch(trained, tmp_path):
    trained.save(tmp_path)
    code = (
        "import sys; from nanochat.tokenizer import get_tokenizer; t = get_tokenizer(sys.argv[1]); "
        "t.encode('hi', prepend='<|bos|>'); print(*sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "tiktoken", "tokenizers"} & set(loaded.stdout.split())
