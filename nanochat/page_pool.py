"""Memory for keys and values: pages, which rows and remembered beginnings take and give back within one budget.

A page has room for PAGE positions of one row. A row holds as many as it has tokens, whatever the longest row does
(paged attention, Kwon et al. 2023, arXiv 2309.06180), and rows that begin alike hold the same pages. Layers that keep
equally many positions form a group, which has pages of its own. Every layer has its own tensors, so that growing
needs only one layer's memory twice. H key/value heads, D head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch

from nanochat.common import ROTARY_FACTOR, upload
from nanochat.kv_cache import Cache
from nanochat.machine import total_ram
from nanochat.network_config import GPTConfig

PAGE = 32  # positions; cpu_decode.cpp knows it, too
# Widest chunk of a prompt that a forward pass adds to a row; layers with a window keep one besides it. The last: NVIDIA's
# GPUs without windows.
CHUNK_TOKENS, CPU_CHUNK_TOKENS, UNWINDOWED_CHUNK_TOKENS = 512, 128, 2048


class CachedModel(Protocol):
    """The part of GPT that generation uses."""

    config: GPTConfig
    compute_dtype: torch.dtype

    def get_device(self) -> torch.device: ...

    def embed(self, idx: torch.Tensor) -> torch.Tensor: ...

    def forward(
        self,
        idx: torch.Tensor,
        *,
        kv_cache: Cache | None = None,
        lengths: Sequence[int] | None = None,
        last_only: bool = False,
    ) -> torch.Tensor: ...


def default_cache_bytes(device: torch.device) -> int:
    """Memory for keys and values: on a GPU 80 % of what is free, elsewhere a quarter of the machine's or container's."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(0.8 * (torch.cuda.mem_get_info(device)[0] + cached))
    return total_ram() // 4


class PageGroup:
    """Layers that keep the same positions, and how many hold each of their pages.

    A row uses at most `ring` pages, in a cycle: position p is in page p // PAGE % ring of the row's. `wraps` says that
    this is fewer than all positions need, because a window hides the others. Page 0 belongs to nobody: what has to be
    written somewhere, but is never looked at, goes there.
    """

    def __init__(self, layers: Sequence[int], ring: int, wraps: bool, page_bytes: int) -> None:
        self.layers, self.ring, self.wraps, self.page_bytes = layers, ring, wraps, page_bytes
        self.uses = np.zeros(0, np.int32)
        self.free: list[int] = []

    @property
    def capacity(self) -> int:
        return len(self.uses)

    @property
    def num_used(self) -> int:
        """Pages that are not free, page 0 among them."""
        return max(self.capacity - len(self.free), 1)

    def pages_for(self, tokens: np.ndarray | int) -> np.ndarray:
        """Pages of rows of so many tokens, each."""
        return np.minimum(-(-tokens // PAGE), self.ring)

    def take(self, count: int) -> np.ndarray:
        """Some free pages, which somebody holds from now on."""
        pages = np.array([self.free.pop() for _ in range(count)], np.int32)
        self.uses[pages] = 1
        return pages

    def hold(self, pages: np.ndarray | Sequence[int]) -> None:
        """One more holder of pages that are taken already."""
        self.uses[pages] += 1

    def release(self, pages: np.ndarray | Sequence[int]) -> None:
        """One holder less; pages without any are free, the first of them to be taken first."""
        self.uses[pages] -= 1
        self.free.extend(int(page) for page in reversed(pages) if not self.uses[page])


class PageHolder(Protocol):
    """Whoever keeps numbers of pages and has to hear when they change."""

    def renumber(self, group: int, numbers: np.ndarray) -> None: ...


class PagePool:
    """Keys and values of a model: `keys[layer]` and `values[layer]` are (pages, PAGE, H, D).

    max_bytes bounds all of it; max_width is the widest chunk that a forward pass may add to a row. Defaults suit the
    device. generation counts how often tensors have been replaced.
    """

    def __init__(
        self, model: CachedModel, max_bytes: int | None = None, max_width: int | None = None
    ) -> None:
        config = model.config
        self.device, self.dtype = model.get_device(), model.compute_dtype
        self.max_bytes = default_cache_bytes(self.device) if max_bytes is None else max_bytes
        self.generation = 0
        self._page_shape = (PAGE, config.n_kv_head, config.head_dim)
        self._context = config.sequence_len
        self.max_width = max_width or self._default_width(min(config.window_sizes))
        self._holders: weakref.WeakSet[PageHolder] = weakref.WeakSet()
        windows = config.window_sizes
        rings = [self._ring(window) for window in windows]
        self.rings = {window: ring * PAGE for window, ring in zip(windows, rings, strict=True)}
        self.groups: list[PageGroup] = []
        self.group_of = [sorted(set(rings)).index(ring) for ring in rings]
        for ring in sorted(set(rings)):
            layers = [layer for layer, own in enumerate(rings) if own == ring]
            page_bytes = 2 * len(layers) * int(np.prod(self._page_shape)) * self.dtype.itemsize
            self.groups.append(PageGroup(layers, ring, ring < self._ring(config.sequence_len), page_bytes))
        self.keys = [self._empty(0) for _ in windows]
        self.values = [self._empty(0) for _ in windows]

    def _default_width(self, window: int) -> int:
        if self.device.type == "cpu":
            return CPU_CHUNK_TOKENS
        wide = self.device.type == "cuda" and window >= self._context and self._has_kernels()
        return UNWINDOWED_CHUNK_TOKENS if wide else CHUNK_TOKENS

    def _has_kernels(self) -> bool:
        """Whether prompts are read without holding the scores of a chunk."""
        from nanochat.cuda_graphs import kernels_run

        return kernels_run(self.device)

    def _ring(self, window: int) -> int:
        """Pages that a row needs so that a chunk, its padding included, never overwrites what its own queries see."""
        every = -(-ROTARY_FACTOR * self._context // PAGE)
        if window >= self._context:
            return every
        # A page more than window and chunk, so that writing a chunk spares the page before the window.
        return min(-(-(window + self.max_width) // PAGE) + 1, every)

    def _empty(self, pages: int) -> torch.Tensor:
        # Not uninitialised: a NaN in a hidden slot would survive its weight of zero.
        return torch.zeros((pages, *self._page_shape), dtype=self.dtype, device=self.device)

    def register(self, holder: PageHolder) -> None:
        """Tell a holder from now on when pages get other numbers."""
        self._holders.add(holder)

    # --- how much ------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, free ones included."""
        return self._bytes([group.capacity for group in self.groups])

    @property
    def block_bytes(self) -> int:
        """Bytes of PAGE positions in all layers."""
        return sum(group.page_bytes for group in self.groups)

    def bytes_for(self, tokens: int) -> int:
        """Bytes that a row of so many tokens needs where it is alone."""
        return self._bytes(self._counts(tokens))

    def _counts(self, tokens: int) -> list[int]:
        return [1 + int(group.pages_for(tokens)) for group in self.groups]

    def fits(self, wanted: Iterable[int], spare: int = 0) -> bool:
        """Whether so many more pages of each group may be taken, and leave some bytes."""
        used = [group.num_used + count for group, count in zip(self.groups, wanted, strict=True)]
        return self._bytes(used) <= self.max_bytes - spare

    def has_free(self, wanted: Iterable[int]) -> bool:
        """Whether so many pages of each group are free already."""
        return all(
            group.num_used + count <= group.capacity for group, count in zip(self.groups, wanted, strict=True)
        )

    # --- growing and shrinking -----------------------------------------------------------------------

    def ensure(self, wanted: Sequence[int]) -> None:
        """Have so many free pages of each group, which must fit."""
        if self.has_free(wanted):
            return
        needed = [group.num_used + count for group, count in zip(self.groups, wanted, strict=True)]
        sizes = [
            group.capacity if count <= group.capacity else max(count, 2 * group.capacity, least)
            for group, count, least in zip(self.groups, needed, self._counts(self._context), strict=True)
        ]
        if self._bytes(sizes) > self.max_bytes:
            # Shared in proportion: had one group all that is left, the other would soon want it back.
            total = self._bytes(needed)
            sizes = [count + (self.max_bytes - total) * count // total for count in needed]
        for number in sorted(range(len(sizes)), key=lambda i: sizes[i] - self.groups[i].capacity):
            self._resize(number, sizes[number])  # those that shrink come first

    def _bytes(self, counts: Sequence[int]) -> int:
        return sum(count * group.page_bytes for count, group in zip(counts, self.groups, strict=True))

    def shrink(self, soon: Sequence[int] = ()) -> None:
        """Give back memory if most of it is free, but for what one row of the whole context needs.

        soon: pages of each group that will soon be taken and count as taken.
        """
        for number, least in enumerate(self._counts(self._context)):
            group = self.groups[number]
            needed = group.num_used + (soon[number] if soon else 0)
            if group.capacity > max(4 * needed, least):
                self._resize(number, max(2 * needed, least))

    def _resize(self, number: int, capacity: int) -> None:
        """Memory may end in the middle of it: then a group has its old or its new capacity, and no page is lost."""
        group = self.groups[number]
        if capacity == group.capacity:
            return
        if capacity < group.capacity:
            self._move_down(number, capacity)
        self.generation += 1
        kept = group.capacity
        for layer in group.layers:
            for tensors in (self.keys, self.values):
                new = self._empty(capacity)
                new[:kept].copy_(tensors[layer][:kept])
                tensors[layer] = new
        group.uses = np.concatenate([group.uses, np.zeros(capacity - kept, np.int32)])
        group.uses[0] = max(group.uses[0], 1)
        group.free = np.flatnonzero(group.uses == 0)[::-1].tolist()

    def _move_down(self, number: int, capacity: int) -> None:
        """Have no page of a group at capacity or beyond."""
        group = self.groups[number]
        old = np.flatnonzero(group.uses[capacity:]) + capacity
        new = np.flatnonzero(group.uses[:capacity] == 0)[: len(old)]
        self.copy(number, old, new)
        numbers = np.arange(group.capacity, dtype=np.int32)
        numbers[old] = new
        group.uses[new] = group.uses[old]
        group.uses = group.uses[:capacity].copy()
        group.free = np.flatnonzero(group.uses == 0)[::-1].tolist()
        for holder in self._holders:
            holder.renumber(number, numbers)

    def copy(self, number: int, sources: np.ndarray | Sequence[int], targets: np.ndarray) -> None:
        """Copy what pages of a group hold to others."""
        if not len(targets):
            return
        old, new = (upload(np.asarray(pages, np.int64), self.device) for pages in (sources, targets))
        for layer in self.groups[number].layers:
            for tensors in (self.keys, self.values):
                tensors[layer][new] = tensors[layer][old]
