"""Which test examples a model may have seen in training: word n-grams that they share with the shards.

Words are lower-cased runs of letters and digits, so that punctuation and line breaks hide nothing. n = 13 words
is the usual size [GPT-3, arXiv 2005.14165, appendix C]. n-grams that occur in many examples of a test set are its
own boilerplate and are ignored.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np

from nanochat.dataset import open_shard, read_row_group

MAX_EXAMPLES = 10  # an n-gram in more examples of a set than this is boilerplate
_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so multiplying loses nothing


class WordHashes:
    """64-bit hashes of words that are the same in every process; Python's own are not."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, text: str) -> np.ndarray:
        """(words,) uint64."""
        known, words = self._known, _WORD.findall(text.lower())
        for word in words:
            if word not in known:
                known[word] = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        return np.fromiter((known[word] for word in words), dtype=np.uint64, count=len(words))


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """(words - n + 1,) uint64, one per n consecutive words; empty for shorter texts."""
    count = max(len(words) - n + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(n):  # Horner's rule, modulo 2^64
        hashes = hashes * _MULTIPLIER + words[offset : offset + count]
    return hashes


@dataclass(frozen=True)
class TestSet:
    """Texts of the examples; an example may have several, and no n-gram goes from one to the next."""

    __test__ = False  # pytest takes classes named Test... for tests

    name: str
    examples: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Index:
    """The n-grams of all test sets; owners[i] are the (set, example) that hold grams[i]."""

    n: int
    grams: np.ndarray  # (G,) uint64, sorted
    owners: list[list[tuple[int, int]]]
    num_grams: list[list[int]]  # by set and example: those that count

    @classmethod
    def build(cls, sets: Sequence[TestSet], n: int) -> Index:
        """Collect the n-grams of the examples."""
        hashes, holders = WordHashes(), defaultdict(list)
        num_grams = [[0] * len(test_set.examples) for test_set in sets]
        for place, test_set in enumerate(sets):
            own: dict[int, list[int]] = defaultdict(list)
            for number, texts in enumerate(test_set.examples):
                grams = {int(gram) for text in texts for gram in ngram_hashes(hashes(text), n)}
                for gram in grams:
                    own[gram].append(number)
            for gram, numbers in own.items():
                if len(numbers) <= MAX_EXAMPLES:
                    holders[gram] += [(place, number) for number in numbers]
                    for number in numbers:
                        num_grams[place][number] += 1
        grams = np.array(sorted(holders), dtype=np.uint64)
        return cls(n, grams, [holders[int(gram)] for gram in grams], num_grams)

    def find(self, words: np.ndarray) -> np.ndarray:
        """Indices into grams of the n-grams that a text has in common with the test sets."""
        if not len(self.grams):
            return np.empty(0, dtype=np.int64)
        hashes = ngram_hashes(words, self.n)
        places = np.searchsorted(self.grams, hashes).clip(max=len(self.grams) - 1)
        return places[self.grams[places] == hashes]


@dataclass(frozen=True, slots=True)
class Sighting:
    """Where an n-gram was seen first."""

    shard: str
    row: int


@dataclass(frozen=True, slots=True)
class Overlap:
    """An example of which something was seen. share: part of its n-grams that occur in the shards."""

    test_set: str
    example: int
    share: float
    seen_in: Sighting


@dataclass(frozen=True)
class SetReport:
    """Counts of a test set. num_short: too few words to judge. num_touched: at least one n-gram was seen.

    num_dirty: at least half of the n-grams were seen.
    """

    name: str
    num_examples: int
    num_short: int
    num_touched: int
    num_dirty: int


def scan_shard(path: Path, index: Index) -> dict[int, Sighting]:
    """The n-grams of the index that occur in a shard, with the row where each was seen first."""
    hashes, found, row = WordHashes(), {}, 0
    with open_shard(path) as file:
        for group in range(file.num_row_groups):
            for text in read_row_group(path, file, group):
                for gram in index.find(hashes(text)).tolist():
                    found.setdefault(gram, Sighting(path.name, row))
                row += 1
    return found


def scan(paths: Sequence[Path], index: Index, workers: int) -> Iterator[dict[int, Sighting]]:
    """Sightings of each shard, in the order of the shards; several processes share the work."""
    if workers <= 1:
        yield from (scan_shard(path, index) for path in paths)
        return
    with ProcessPoolExecutor(min(workers, len(paths))) as pool:
        yield from pool.map(partial(scan_shard, index=index), paths)


def judge(
    sets: Sequence[TestSet], index: Index, sightings: Iterable[Mapping[int, Sighting]]
) -> tuple[list[SetReport], list[Overlap]]:
    """Counts by test set, and every example of which something was seen, the most complete ones first."""
    first: dict[int, Sighting] = {}
    for found in sightings:
        for gram, sighting in found.items():
            first.setdefault(gram, sighting)
    seen: Counter[tuple[int, int]] = Counter()
    places: dict[tuple[int, int], Sighting] = {}
    for gram, sighting in first.items():
        for owner in index.owners[gram]:
            seen[owner] += 1
            places.setdefault(owner, sighting)
    overlaps = [
        Overlap(sets[place].name, number, count / index.num_grams[place][number], places[place, number])
        for (place, number), count in seen.items()
    ]
    reports = []
    for place, test_set in enumerate(sets):
        own = [overlap.share for overlap in overlaps if overlap.test_set == test_set.name]
        num_short = sum(count == 0 for count in index.num_grams[place])
        num_dirty = sum(share >= 0.5 for share in own)
        reports.append(SetReport(test_set.name, len(test_set.examples), num_short, len(own), num_dirty))
    return reports, sorted(overlaps, key=lambda o: (-o.share, o.test_set, o.example))
