"""Byte-pair encoding as slow and obvious as it can be, for comparison with the crate, and texts to compare on."""

from __future__ import annotations

import random
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import regex  # comes with tiktoken
import tiktoken

import rustbpe
from rustbpe import NANOCHAT_PATTERN

WORDS = [
    "the",
    "quick",
    "Brown",
    "fox",
    "don't",
    "WE'LL",
    "12345",
    "3.14",
    "na\xefve",
    "caf\xe9",
    "\u65e5\u672c\u8a9e",
    "\ud55c\uad6d\uc5b4",
    "\u0e44\u0e17\u0e22",
    "\U0001f642\U0001f469\u200d\U0001f680",
    "\u3000",
    "\xbd",
    "\u2167",
    "...",
    "!?",
    "\t\n\r\n",
    "",
    "\xa0",
]

# Every kind of white space, and signs that look like it but are none.
BLANKS = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000\x1c\x1f\u180e\u200b\ufeff"
)
# Combining marks, neighbours of the surrogates, code points that will never be assigned, private ones, joiners.
ODD = "\u0301\u0e33\u20dd\ufe0f\U000e0100\ud7ff\ue000\ufdd0\ufffe\uffff\U0001ffff\U0010ffff\U000f0000\u200d"
ODD += "\u0378\U000e0fff"  # not assigned in any version so far
# What the patterns name, in several cases, and the one letter that folds to an ASCII letter of theirs.
NAMED = "'sSdDmMtTlLvVrReE\u017f\u2019aZ09\u0664\xbd\u2167\xe9\u65e5\uac00_.!"


def learned(texts: Iterable[str], vocab_size: int, **options: int) -> tuple[rustbpe.Tokenizer, list[bytes]]:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=NANOCHAT_PATTERN, **options)
    return tokenizer, [token for token, _ in tokenizer.get_mergeable_ranks()[256:]]


def pieces(text: str, pattern: str = NANOCHAT_PATTERN) -> list[bytes]:
    """The pieces of a text, by an engine that shares no table with the crate's."""
    return [found.group().encode() for found in regex.finditer(pattern, text)]


def slow_merges(words: Counter[bytes], num_merges: int) -> list[bytes]:
    """Tokens learned by recounting every pair before every merge; ties go to the smallest pair."""
    corpus = [(list(word), count) for word, count in words.items()]
    spelled = {byte: bytes([byte]) for byte in range(256)}
    for new in range(256, 256 + num_merges):
        pairs: Counter[tuple[int, int]] = Counter()
        for ids, count in corpus:
            for pair in pairwise(ids):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        spelled[new] = spelled[best[0]] + spelled[best[1]]
        corpus = [(replaced(ids, best, new), count) for ids, count in corpus]
    return [spelled[token] for token in sorted(spelled)[256:]]


def replaced(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    result, at = [], 0
    while at < len(ids):
        found = tuple(ids[at : at + 2]) == pair
        result.append(new if found else ids[at])
        at += 2 if found else 1
    return result


def slow_ids(ranks: dict[bytes, int], piece: bytes) -> list[int]:
    """Tokens of a piece: it is one, or the lowest rank of two neighbours is merged, leftmost first, until none is left."""
    parts = [piece] if piece in ranks else [bytes([byte]) for byte in piece]
    while True:
        joined = [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not joined:
            return [ranks[part] for part in parts]
        at = min(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def as_tiktoken(tokenizer: rustbpe.Tokenizer, pattern: str = NANOCHAT_PATTERN) -> tiktoken.Encoding:
    ranks = dict(tokenizer.get_mergeable_ranks())
    return tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def corpus(seed: int, num_texts: int = 300) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(60))) for _ in range(num_texts)]


def assigned_characters() -> str:
    """All characters that Python knows; its Unicode is older than that of any splitter, which may know more."""
    codes = (chr(code) for code in range(sys.maxunicode + 1))
    return "".join(char for char in codes if unicodedata.category(char) not in ("Cn", "Cs"))


def random_texts(seed: int, num_texts: int, characters: str) -> Iterable[str]:
    """Texts of every sort: words, runs of one character, any characters, those that the patterns name."""
    draw = random.Random(seed)
    sources = [BLANKS, ODD, NAMED, characters, "abc ", "".join(map(chr, range(128)))]
    for _ in range(num_texts):
        parts = []
        for _ in range(draw.randrange(12)):
            kind, source = draw.randrange(4), draw.choice(sources)
            if kind == 0:
                parts.append(draw.choice(WORDS))
            elif kind == 1:
                parts.append(draw.choice(source) * draw.randrange(1, 40))
            else:
                parts.append("".join(draw.choices(source, k=draw.randrange(1, 9))))
        yield "".join(parts)
