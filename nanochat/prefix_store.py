"""Keys and values of token sequences that were read before, in blocks, for requests that begin alike.

A block is the pages of PAGE tokens, one of each group of layers. It is named by a digest of all tokens up to its end,
so that a name stands for one prefix only. The next turn of a chat, the samples of one question and prompts with the
same examples meet here.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from torch import nn

from nanochat.page_pool import PagePool


def block_names(tokens: Sequence[int], size: int, parent: bytes = b"") -> Iterator[bytes]:
    """One name for each full block of tokens; parent is the name of the block before the first."""
    for end in range(size, len(tokens) + 1, size):
        parent = hashlib.blake2b(
            parent + array("q", tokens[end - size : end]).tobytes(), digest_size=16
        ).digest()
        yield parent


def weights_version(model: object) -> int:
    """A number that changes when an optimiser, or anything else, writes to the model's parameters."""
    if not isinstance(model, nn.Module):
        return 0
    return sum(0 if p.is_inference() else p._version for p in model.parameters())


class PrefixStore:
    """Blocks by name, each the number of a page in every group of the pool.

    At most half of the pool's bytes are kept; blocks that were used longest ago are forgotten first.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.tokens_reused = 0
        self._blocks: OrderedDict[bytes, list[int]] = OrderedDict()
        self.version = 0
        pool.register(self)

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, name: bytes) -> bool:
        return name in self._blocks

    def validate(self, version: int) -> None:
        """Forget everything if the weights are no longer those that computed it."""
        if version != self.version:
            self.clear()
            self.version = version

    def match(self, names: Sequence[bytes]) -> list[list[int]]:
        """The blocks of the longest known prefix of names."""
        found = []
        for name in names:
            if (block := self._blocks.get(name)) is None:
                break
            found.append(block)
        for name in reversed(names[: len(found)]):  # a block is useless without those before it
            self._blocks.move_to_end(name)
        return found

    def add(self, name: bytes, block: list[int]) -> None:
        """Keep a block, whose pages the caller has taken or holds and hands over."""
        assert name not in self._blocks
        self._blocks[name] = block
        while len(self._blocks) * self.pool.block_bytes > self.pool.max_bytes // 2:
            self._forget_oldest()

    def make_room(self, wanted: Sequence[int], keep: int = 0) -> bool:
        """Forget blocks, but not those that `match` has just found, until so many pages of each group are free.

        keep: how many these are. False, and nothing is forgotten, if there is no room even so.
        """
        pool = self.pool
        if pool.has_free(wanted):
            return True
        if not pool.fits(wanted) and not pool.fits(np.subtract(wanted, self._releasable(keep)).tolist()):
            return False
        while not pool.fits(wanted):
            self._forget_oldest()
        # Some more: were it one page each time, groups would be resized each time.
        spare = pool.max_bytes // 16
        for _ in range(min(spare // pool.block_bytes, len(self._blocks) - keep)):
            if pool.fits(wanted, spare):
                break
            self._forget_oldest()
        pool.ensure(wanted)
        return True

    def _releasable(self, keep: int) -> list[int]:
        """Pages of each group that nobody else holds, but for the blocks that were used last."""
        blocks = list(islice(self._blocks.values(), max(len(self._blocks) - keep, 0)))
        if not blocks:
            return [0] * len(self.pool.groups)
        pages = np.array(blocks).T
        return [int((group.uses[own] == 1).sum()) for group, own in zip(self.pool.groups, pages, strict=True)]

    def _forget_oldest(self) -> None:
        _, block = self._blocks.popitem(last=False)
        for group, page in zip(self.pool.groups, block, strict=True):
            group.release([page])

    def clear(self) -> None:
        """Forget everything. The pool keeps its memory, because others are about to be read; rows that end give it back."""
        while self._blocks:
            self._forget_oldest()

    def renumber(self, group: int, numbers: np.ndarray) -> None:
        """Follow pages that were moved."""
        for block in self._blocks.values():
            block[group] = int(numbers[block[group]])
