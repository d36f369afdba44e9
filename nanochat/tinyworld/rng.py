"""Chance and held-out keys that are the same on every platform and Python version."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar
from zlib import crc32

Item = TypeVar("Item")


class Rng:
    """Independent stream of chance for a seed and a stream name.

    Only `random.Random.random()` is used: of all its methods it alone promises the same numbers for the
    same integer seed in every Python version.
    """

    __slots__ = ("random",)

    def __init__(self, seed: int, stream: str) -> None:
        self.random = random.Random((seed << 32) | crc32(stream.encode())).random

    def below(self, limit: int) -> int:
        """Integer in [0, limit)."""
        return int(self.random() * limit)

    def between(self, low: int, high: int) -> int:
        """Integer in [low, high]."""
        return low + int(self.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.random() < probability

    def pick(self, items: Sequence[Item]) -> Item:
        """One item, all equally likely."""
        return items[int(self.random() * len(items))]

    def weighted(self, weights: Sequence[tuple[Item, float]]) -> Item:
        """One item by its weight."""
        point = self.random() * sum(weight for _, weight in weights)
        for item, weight in weights:
            point -= weight
            if point < 0:
                return item
        return weights[-1][0]

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` different positions of `items` in random order."""
        pool = list(items)
        size = len(pool)
        for i in range(count):
            j = i + int(self.random() * (size - i))
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """All items in random order."""
        return self.sample(items, len(items))


def held_out(key: str, every: int = 10) -> bool:
    """Whether a key belongs to the test side: about one key in `every`, decided by the key alone."""
    return crc32(key.encode()) % every == 0
