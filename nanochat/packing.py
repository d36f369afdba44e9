"""Which buffered documents go into a row next: the longest that fits, the shortest, or those that fill it up."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT")
ItemT = TypeVar("ItemT")


class BestFitBuffer(Generic[KeyT, ItemT]):
    """Documents in order of arrival, found by length; of equally long ones the first to arrive goes first.

    Single choices are those of a linear scan over the buffer. A sorted list of the lengths present and one
    queue per length make a choice cost O(log n) and a memmove instead of a pass over the buffer.
    """

    def __init__(self) -> None:
        self._items: dict[KeyT, ItemT] = {}  # a dict keeps the order of arrival under deletion
        self._lengths: list[int] = []
        self._queues: dict[int, deque[KeyT]] = {}

    def __len__(self) -> int:
        return len(self._items)

    def keys(self) -> tuple[KeyT, ...]:
        """Keys of all documents in order of arrival; adding them again in this order restores the buffer."""
        return tuple(self._items)

    def add(self, key: KeyT, length: int, item: ItemT) -> None:
        """Append a document. Keys are unique."""
        assert key not in self._items, f"{key} is buffered twice"
        self._items[key] = item
        queue = self._queues.get(length)
        if queue is None:
            queue = self._queues[length] = deque()
            insort(self._lengths, length)
        queue.append(key)

    def take_longest(self, limit: int) -> ItemT | None:
        """Remove and return the longest document of at most `limit` tokens; None if there is none."""
        index = bisect_right(self._lengths, limit) - 1
        return None if index < 0 else self._take(self._lengths[index])

    def take_filling(self, limit: int, slack: int = 0) -> list[ItemT]:
        """Remove and return documents that together fill `limit`, but for `slack` or less; as much as is possible if
        none do. Of such choices the one with the longest documents: short ones are worth keeping to fill rows with.

        Which sums can be reached is one bit each of a Python integer, so that adding a document is a shift.
        """
        lengths = [length for length in self._lengths for _ in self._queues[length] if length <= limit]
        within = (1 << (limit + 1)) - 1
        reachable = [1]  # reachable[i]: sums of the i shortest documents
        for length in lengths:
            reachable.append((reachable[-1] | reachable[-1] << length) & within)
        high = limit
        low = max(min(limit - slack, reachable[-1].bit_length() - 1), 0)  # the sum must come to lie between
        taken = []
        for before, length in zip(reversed(reachable[:-1]), reversed(lengths), strict=True):
            rest = before & ((1 << max(high - length + 1, 0)) - 1)  # sums that do not lead beyond high
            if rest >> max(low - length, 0):
                taken.append(self._take(length))
                high, low = high - length, low - length
        return taken

    def take_shortest(self) -> ItemT:
        """Remove and return the shortest document."""
        return self._take(self._lengths[0])

    def _take(self, length: int) -> ItemT:
        queue = self._queues[length]
        key = queue.popleft()
        if not queue:
            del self._queues[length]
            del self._lengths[bisect_left(self._lengths, length)]
        return self._items.pop(key)
