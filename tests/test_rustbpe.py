"""The crate from Python: vectors, arrays, special tokens, streams, errors, Ctrl-C, memory; see test_rustbpe_exact."""

from __future__ import annotations

import logging
import random
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import pytest

import rustbpe
from rustbpe import GPT4_PATTERN, NANOCHAT_PATTERN
from tests.bpe_reference import WORDS, as_tiktoken, corpus, learned

Ranks = list[tuple[bytes, int]]
needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture(scope="module")
def trained() -> rustbpe.Tokenizer:
    return learned(corpus(0), 500)[0]


@pytest.mark.parametrize(
    ("text", "vocab_size", "tokens", "encoded", "ids"),
    [
        ("aaabdaaabac", 259, "aa ab aaab", "aaabdaaabac", [258, 100, 258, 97, 99]),
        ("abab baba", 262, "ab _b aba abab _baba", "abab baba", [259, 260]),
        ("zz yy xx ww", 264, "_w _x _y zz _ww _xx _yy", "zz ww", [259, 260]),
        ("aaaaa aaaa aaa", 264, "aa _aa aaa aaaaa _aaa _aaaa", "aaaaaaa", [256, 259]),
        (
            "low low low lower lowest newest newest widest",
            268,
            "lo low _low es est _n ew _new _newest _w dest er",
            "lowest newer",
            [257, 260, 263, 267],
        ),
        ("\xe9 \xe9 \xe9", 258, "\xe9 _\xe9", "\xe9", [256]),
    ],
)
def test_vectors(text: str, vocab_size: int, tokens: str, encoded: str, ids: list[int]) -> None:
    tokenizer, found = learned([text], vocab_size)
    assert found == [token.replace("_", " ").encode() for token in tokens.split()]
    assert tokenizer.encode(encoded) == ids
    assert tokenizer.vocab_size == 256 + len(found)
    assert tokenizer.get_mergeable_ranks()[:256] == [(bytes([byte]), byte) for byte in range(256)]


@pytest.mark.parametrize("pattern", [GPT4_PATTERN, r"\w+|\W"])
def test_other_patterns_equal_tiktoken(trained: rustbpe.Tokenizer, pattern: str) -> None:
    tokenizer = rustbpe.Tokenizer.from_ranks(trained.get_mergeable_ranks(), pattern)
    reference = as_tiktoken(trained, pattern)
    for text in corpus(1, 50):
        assert tokenizer.encode(text) == reference.encode_ordinary(text)
    assert tokenizer.get_pattern() == pattern


def test_a_million_letters_do_not_hang(trained: rustbpe.Tokenizer) -> None:
    start = time.process_time()
    text = "abcdefghij" * 200_000
    assert trained.decode(trained.encode(text)) == text
    assert len(learned([text], 300)[1]) > 5
    assert time.process_time() - start < 30  # quadratic work would take hours


def test_lone_surrogates_are_replaced_as_tiktoken_does(trained: rustbpe.Tokenizer) -> None:
    text = "a\ud800b \udfff\ud83d\ude00"
    assert trained.encode(text) == as_tiktoken(trained).encode_ordinary(text)
    assert trained.batch_encode([text]) == [trained.encode(text)]


def test_batches_equal_single_texts(trained: rustbpe.Tokenizer) -> None:
    texts = ["", *corpus(2, 500), ""]
    rows, last = [trained.encode(text) for text in texts], trained.vocab_size - 1
    assert trained.batch_encode(iter(texts)) == rows
    for num_threads in (1, 3, None):
        ids, offsets = trained.encode_batch_arrays(texts, prepend=7, append=last, num_threads=num_threads)
        assert ids.dtype == np.uint16 and offsets.dtype == np.int64 and ids.flags.writeable
        framed = [ids[a:b].tolist() for a, b in pairwise(offsets)]
        assert framed == [[7, *row, last] for row in rows]
    ids, offsets = trained.encode_batch_arrays(iter([]))
    assert len(ids) == 0 and offsets.tolist() == [0]


@pytest.mark.parametrize(
    ("largest", "dtype"), [(255, "uint8"), (256, "uint16"), (65535, "uint16"), (65536, "uint32")]
)
def test_arrays_have_the_smallest_dtype(largest: int, dtype: str) -> None:
    special = {"<x>": largest} if largest > 255 else {}
    tokenizer = rustbpe.Tokenizer.from_ranks(byte_ranks(), NANOCHAT_PATTERN, special)
    ids, _ = tokenizer.encode_batch_arrays(["\xe9"])
    assert ids.dtype == dtype and ids.tolist() == [0xC3, 0xA9]


def byte_ranks() -> Ranks:
    return [(bytes([byte]), byte) for byte in range(256)]


def test_special_tokens_only_where_allowed() -> None:
    tokenizer = rustbpe.Tokenizer.from_ranks(byte_ranks(), NANOCHAT_PATTERN, {"<|bos|>": 256, "<|end|>": 257})
    assert tokenizer.encode("<|bos|>") == list(b"<|bos|>") == tokenizer.encode_ordinary("<|bos|>")
    assert tokenizer.encode("a<|bos|><|end|>", allowed_special={"<|bos|>"}) == [97, 256, *b"<|end|>"]
    assert tokenizer.token_bytes(257) == b"<|end|>" and tokenizer.decode([256, 97]) == "<|bos|>a"
    assert tokenizer.special_tokens == {"<|bos|>": 256, "<|end|>": 257} and tokenizer.vocab_size == 256
    texts = ["a<|bos|><|end|>", "<|bos|>b"]
    ids, offsets = tokenizer.encode_batch_arrays(texts, append=257, allowed_special={"<|bos|>"})
    assert ids.tolist() == [97, 256, *b"<|end|>", 257, 256, 98, 257] and offsets.tolist() == [0, 10, 13]
    for encode in (tokenizer.encode, tokenizer.encode_batch_arrays):
        with pytest.raises(ValueError, match="not a special token"):
            encode(["a"] if encode == tokenizer.encode_batch_arrays else "a", allowed_special={"<|eos|>"})


def test_merges_by_rank(trained: rustbpe.Tokenizer) -> None:
    token = dict(map(reversed, trained.get_mergeable_ranks()))
    merges = trained.get_merges()
    assert [merged for *_, merged in merges] == list(range(256, trained.vocab_size))
    assert all(token[left] + token[right] == token[merged] for left, right, merged in merges)


def test_decoding(trained: rustbpe.Tokenizer) -> None:
    text = " ".join(WORDS)
    ids = trained.encode(text)
    assert trained.decode(ids) == trained.decode(np.array(ids, dtype=np.uint16)) == text
    assert trained.decode_bytes(ids) == b"".join(map(trained.token_bytes, ids)) == text.encode()
    with pytest.raises(UnicodeDecodeError) as caught:
        trained.decode([97, 0xC3])
    assert (caught.value.object, caught.value.start, caught.value.end) == (b"a\xc3", 1, 2)
    assert trained.decode([97, 0xC3], errors="replace") == "a\ufffd"
    for unknown in (10**6, -1, 10**12, 2**70, -(2**70)):
        message = f"^no token has id {unknown}$"
        with pytest.raises(ValueError, match=message):
            trained.decode([unknown])
        with pytest.raises(ValueError, match=message):
            trained.token_bytes(unknown)
        for option in ("prepend", "append"):
            with pytest.raises(ValueError, match=message):
                trained.encode_batch_arrays(["a"], **{option: unknown})


def test_untrained() -> None:
    tokenizer = rustbpe.Tokenizer()
    assert tokenizer.get_pattern() == "" and tokenizer.encode("abc") == [] and tokenizer.vocab_size == 256


class Unreadable:
    def __iter__(self) -> Iterator[str]:
        raise AssertionError("read before the arguments were checked")


@pytest.mark.parametrize(
    "options",
    [
        *({"vocab_size": size} for size in (255, -1, 2**24 + 1, 2**63, -(2**63) - 1)),
        *({"buffer_size": size} for size in (0, -1, 2**70)),
        *({"num_threads": number} for number in (0, -1, 2**70)),
        {"pattern": "("},
    ],
)
def test_bad_arguments_are_found_before_reading(options: dict[str, int | str]) -> None:
    name, value = next(iter(options.items()))
    message = "^invalid split pattern" if name == "pattern" else f"^{name} is {value}; give .*$"
    with pytest.raises(ValueError, match=message):
        rustbpe.Tokenizer().train_from_iterator(Unreadable(), **{"vocab_size": 300, **options})
    if name == "num_threads":
        with pytest.raises(ValueError, match=message):
            rustbpe.Tokenizer().encode_batch_arrays(["a"], **options)


def test_huge_arguments_are_harmless(trained: rustbpe.Tokenizer) -> None:
    huge = {"buffer_size": 2**62, "num_threads": 10**9}
    assert learned(["ab ab"], 2**24, **huge)[1] == learned(["ab ab"], 300)[1]
    assert trained.batch_encode(["ab"] * 9, num_threads=10**9) == [trained.encode("ab")] * 9


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        ("abc", TypeError),
        (["a", 1], TypeError),
        ([b"a"], TypeError),
        (["\ud800"], UnicodeEncodeError),
        (5, TypeError),
    ],
)
def test_bad_texts(texts: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        rustbpe.Tokenizer().train_from_iterator(texts, 300)


def test_a_failed_training_changes_nothing(trained: rustbpe.Tokenizer) -> None:
    before = trained.get_mergeable_ranks()

    def texts() -> Iterator[str]:
        yield "some text"
        raise KeyError("from the iterator")

    with pytest.raises(KeyError, match="from the iterator"):
        trained.train_from_iterator(texts(), 300, pattern=GPT4_PATTERN)
    with pytest.raises(ValueError):
        trained.train_from_iterator([], 300, pattern="[")
    assert trained.get_pattern() == NANOCHAT_PATTERN and trained.get_mergeable_ranks() == before


def test_an_exhausted_regex_engine_is_an_error(trained: rustbpe.Tokenizer) -> None:
    pattern = r"(?=(a+)+\1b)x|a"  # the back-reference needs the backtracking engine
    with pytest.raises(RuntimeError):
        rustbpe.Tokenizer().train_from_iterator(["a" * 200], 300, pattern=pattern)
    tokenizer = rustbpe.Tokenizer.from_ranks(byte_ranks(), pattern)
    with pytest.raises(RuntimeError):
        tokenizer.encode("a" * 200)
    for num_threads in (1, 3):
        with pytest.raises(RuntimeError):
            tokenizer.encode_batch_arrays(["b" * 100_000, "a" * 200, *["b"] * 9], num_threads=num_threads)


@pytest.mark.parametrize("extra", [(b"a", 256), (b"ab", 255), (b"", 256)])
def test_bad_ranks(extra: tuple[bytes, int]) -> None:
    with pytest.raises(ValueError):
        rustbpe.Tokenizer.from_ranks([*byte_ranks(), extra], NANOCHAT_PATTERN)
    with pytest.raises(ValueError, match="too large"):  # tables by id would need 32 GiB
        rustbpe.Tokenizer.from_ranks([*byte_ranks(), (b"ab", 2**32 - 1)], NANOCHAT_PATTERN)
    for wild in (-1, 2**32, 2**70):
        with pytest.raises(ValueError, match=f"a token cannot have id {wild}"):
            rustbpe.Tokenizer.from_ranks([*byte_ranks(), (b"ab", wild)], NANOCHAT_PATTERN)
        with pytest.raises(ValueError, match=f"a token cannot have id {wild}"):
            rustbpe.Tokenizer.from_ranks(byte_ranks(), NANOCHAT_PATTERN, {"<x>": wild})
    with pytest.raises(ValueError, match="lack the single byte 0x00"):
        rustbpe.Tokenizer.from_ranks(byte_ranks()[1:], NANOCHAT_PATTERN)


def test_progress_is_logged_and_a_small_corpus_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rustbpe"):
        learned(["ab"], 300)
    assert "1 distinct pairs" in caplog.text and "1 of 44 merges" in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING


def test_ctrl_c_stops_training() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "word " * 1000

    timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        rustbpe.Tokenizer().train_from_iterator(endless(), 300, pattern=NANOCHAT_PATTERN)
    timer.join()


def test_ctrl_c_stops_merging(caplog: pytest.LogCaptureFixture) -> None:
    draw = random.Random(0)
    words = [" " + "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=12)) for _ in range(400_000)]

    class Interrupt(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Learning"):
                timer.start()

    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    logger, handler, tokenizer = logging.getLogger("rustbpe"), Interrupt(), rustbpe.Tokenizer()
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, logger="rustbpe"), pytest.raises(KeyboardInterrupt):
            tokenizer.train_from_iterator(words, 1_000_000, pattern=NANOCHAT_PATTERN)
    finally:
        logger.removeHandler(handler)
        timer.join()
    assert tokenizer.vocab_size == 256 and "(100%)" not in caplog.text


def test_other_threads_run_while_it_works(trained: rustbpe.Tokenizer) -> None:
    texts = ["".join(corpus(3, 100))] * 100
    ticks, done = [0], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    while time.monotonic() - start < 0.3:
        trained.encode_batch_arrays(texts, num_threads=1)
    done.set()
    thread.join()
    assert ticks[0] > 20


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@needs_proc
@pytest.mark.parametrize("form", ["encode_batch_arrays", "batch_encode"])
def test_memory_does_not_grow_over_a_thousand_batches(trained: rustbpe.Tokenizer, form: str) -> None:
    texts, encode = corpus(4, 200), getattr(trained, form)
    for _ in range(200):
        encode(texts, num_threads=2)
    before = resident_bytes()
    for _ in range(1000):
        encode(texts, num_threads=2)
    assert resident_bytes() - before < 4 << 20


@needs_proc
def test_training_keeps_pieces_and_not_texts() -> None:
    """A stream of any length trains in the memory that its distinct pieces need."""
    assert growth_of_training(long_texts()) < 40 << 20


def long_texts() -> Iterator[str]:
    text = " ".join(corpus(5, 300))
    text *= 100_000 // len(text)
    for index in range(1000):
        yield f"{index} " + text  # new strings, 100 MB together


def growth_of_training(texts: Iterable[str]) -> int:
    """Bytes by which the process grows at most while it learns from the texts."""
    learned(["warm up"], 300)
    sizes, done = [resident_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            sizes.append(resident_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    learned(texts, 300)
    done.set()
    thread.join()
    return max(sizes) - sizes[0]
