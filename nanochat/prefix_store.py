"""Keys and values of token sequences that were read before, in blocks, for requests that begin alike.

A block is named by a digest of all tokens up to its end, so that a name stands for one prefix only. The next
turn of a chat, the samples of one question and prompts with the same examples meet here.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import nn


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
    """Blocks (2 L, positions, H, D) by name; those that were used longest ago are forgotten first."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.tokens_reused = 0
        self._blocks: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._version = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, name: bytes) -> bool:
        return name in self._blocks

    def validate(self, version: int) -> None:
        """Forget everything if the weights are no longer those that computed it."""
        if version != self._version:
            self.shrink(0)
            self._version = version

    def match(self, names: Sequence[bytes]) -> list[torch.Tensor]:
        """The blocks of the longest known prefix of names."""
        found = []
        for name in names:
            if (block := self._blocks.get(name)) is None:
                break
            found.append(block)
        for name in reversed(names[: len(found)]):  # a block is useless without those before it
            self._blocks.move_to_end(name)
        return found

    def add(self, name: bytes, block: torch.Tensor, max_bytes: int) -> None:
        """Keep a block, and forget others until all take at most max_bytes."""
        size = block.numel() * block.element_size()
        if size > max_bytes or name in self._blocks:
            return
        self.shrink(max_bytes - size)
        self._blocks[name] = block
        self.nbytes += size

    def shrink(self, max_bytes: int) -> None:
        """Forget the blocks used longest ago until the rest take at most max_bytes."""
        while self.nbytes > max_bytes:
            _, block = self._blocks.popitem(last=False)
            self.nbytes -= block.numel() * block.element_size()
