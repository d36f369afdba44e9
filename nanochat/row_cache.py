"""The engine's keys and values: rows of running requests that come, grow, move and go.

A row is a line of a table of pages (page_pool.py) for each group of layers, and a position. Moving it moves these
numbers only; rows that begin alike share pages where no window lets them be overwritten. B rows, T slots, H key/value heads,
D head size, L layers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch

from nanochat.common import upload
from nanochat.cpu_decode import CpuDecoder
from nanochat.cuda_decode import CudaDecoder
from nanochat.flash_attention import describe_backend
from nanochat.kv_cache import Chunk, real_lengths
from nanochat.page_pool import PAGE, CachedModel, PagePool

_MOST_PADDING = 64  # rows more that a decoder may step, see cuda_decode.bucket


class RowCache:
    """Rows 0, 1, ... are in use; `positions` says how many tokens each of them holds.

    `tables[group]` (max_rows, pages) int32 are the pages of each row, 0 where it has none. version counts their changes.
    """

    def __init__(self, model: CachedModel, max_rows: int, pool: PagePool) -> None:
        config = model.config
        self.model, self.max_rows, self.pool = model, max_rows, pool
        self.windows = config.window_sizes
        self.device, self.dtype = pool.device, pool.dtype
        self.positions: list[int] = []
        self.tables = [np.zeros((max_rows, group.ring), np.int32) for group in pool.groups]
        self._held = [np.zeros(max_rows, np.int64) for _ in pool.groups]  # pages of each row
        self.version = 0
        self._rooms: tuple[int, list[int]] = -1, []  # tokens that each row has pages for, as of a version
        self.previous = None
        if config.use_smear:
            shape = (max_rows + _MOST_PADDING, 1, config.n_embd)
            self.previous = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self._decoder = CpuDecoder.of(model) or CudaDecoder.of(model)
        pool.register(self)

    @property
    def can_run_ahead(self) -> bool:
        """Whether a step can be started without waiting for the one before."""
        return isinstance(self._decoder, CudaDecoder)

    def reads_ragged(self, first: int, counts: Sequence[int]) -> bool:
        """Whether the rows from `first` on can read so many tokens each without being padded to one length."""
        return self._decoder is not None and self._decoder.reads(self.positions[first:], counts)

    def describe_attention(self) -> str:
        """What computes the attention of prompts and of decoding, for the log."""
        if isinstance(self._decoder, CudaDecoder):
            prompts = "" if self._decoder.reads([], []) else "prompts: torch SDPA; decoding: "
            return prompts + "our Triton kernels"
        if self.device.type == "cpu":  # elsewhere no sequence that starts a cache is special, see gpt.py
            prompts = describe_backend(self.device, self.dtype)
        else:
            prompts = "torch SDPA"
        if isinstance(self._decoder, CpuDecoder):
            return f"prompts: {prompts}; short prompts and decoding: our C++ step"
        return f"prompts: {prompts}; decoding: torch SDPA"

    # --- pages ---------------------------------------------------------------------------------------

    def has_room(self, tokens: Sequence[int]) -> bool:
        """Whether the rows can hold so many tokens each without another page: asked every step, so no arrays."""
        if self._rooms[0] != self.version:
            held = zip(self.pool.groups, self._held, strict=True)
            rooms = [np.where(pages < group.ring, pages * PAGE, sys.maxsize) for group, pages in held]
            self._rooms = self.version, np.min(rooms, axis=0)[: len(self.positions)].tolist()
        return all(count <= room for count, room in zip(tokens, self._rooms[1], strict=True))

    def missing(self, tokens: Sequence[int], first: int = 0) -> list[int]:
        """Pages of each group that the rows from `first` on lack to hold so many tokens each; rows not begun lack all."""
        counts = np.array(tokens, np.int64)
        return [
            int((group.pages_for(counts) - held[first : first + len(counts)]).clip(0).sum())
            for group, held in zip(self.pool.groups, self._held, strict=True)
        ]

    def extend(self, tokens: Sequence[int], first: int = 0) -> None:
        """Give the rows from `first` on the pages to hold so many tokens each. The pool must have them free."""
        counts = np.array(tokens, np.int64)
        for group, table, held in zip(self.pool.groups, self.tables, self._held, strict=True):
            wanted = group.pages_for(counts)
            for i in np.flatnonzero(wanted > held[first : first + len(counts)]):
                row = first + i
                table[row, held[row] : wanted[i]] = group.take(int(wanted[i] - held[row]))
                held[row] = wanted[i]
                self.version += 1

    def renumber(self, group: int, numbers: np.ndarray) -> None:
        """Follow pages that were moved."""
        rows = slice(len(self.positions))
        self.tables[group][rows] = numbers[self.tables[group][rows]]
        self.version += 1

    # --- rows ----------------------------------------------------------------------------------------

    def add_row(self) -> int:
        """Begin an empty row; its number."""
        row = len(self.positions)
        self.positions.append(0)
        if self.previous is not None:
            self.previous[row] = 0
        self.version += 1
        return row

    def remove_row(self, row: int) -> None:
        """End a row; the last one takes its place."""
        last = len(self.positions) - 1
        for group, table, held in zip(self.pool.groups, self.tables, self._held, strict=True):
            group.release(table[row, : held[row]])
            table[row], held[row] = table[last], held[last]
            table[last], held[last] = 0, 0
        self._keep_previous(row, last)
        self.positions[row] = self.positions[last]
        self.positions.pop()
        self.version += 1

    def swap_rows(self, a: int, b: int) -> None:
        """Exchange what two rows hold."""
        for table, held in zip(self.tables, self._held, strict=True):
            table[[a, b]], held[[a, b]] = table[[b, a]], held[[b, a]]
        if self.previous is not None:
            self.previous[[a, b]] = self.previous[[b, a]]
        self.positions[a], self.positions[b] = self.positions[b], self.positions[a]
        self.version += 1

    def copies(self, source: int) -> list[int]:
        """Pages of each group that a copy of a row needs for itself."""
        return [
            self._filled(number, source) - self._shared(number, source) for number in range(len(self.tables))
        ]

    def copy_row(self, source: int) -> int:
        """Begin a row that equals another one, with free pages where it cannot share them; its number."""
        row = self.add_row()
        for number, (group, table, held) in enumerate(
            zip(self.pool.groups, self.tables, self._held, strict=True)
        ):
            filled, shared = self._filled(number, source), self._shared(number, source)
            group.hold(table[source, :shared])
            own = group.take(filled - shared)
            table[row, :shared], table[row, shared:filled] = table[source, :shared], own
            held[row] = filled  # before the copy, which may fail: pages have an owner at any time
            self.pool.copy(number, table[source, shared:filled], own)
        self._keep_previous(row, source)
        self.positions[row] = self.positions[source]
        return row

    def _filled(self, number: int, row: int) -> int:
        return int(self.pool.groups[number].pages_for(self.positions[row]))

    def _shared(self, number: int, row: int) -> int:
        """The first pages of a row that nobody will write to any more."""
        return 0 if self.pool.groups[number].wraps else self.positions[row] // PAGE

    def _keep_previous(self, row: int, source: int) -> None:
        if self.previous is not None and row != source:
            self.previous[row] = self.previous[source]

    # --- blocks --------------------------------------------------------------------------------------

    @property
    def block_copies(self) -> list[int]:
        """Pages of each group that a block needs besides those of its row."""
        return [int(group.wraps) for group in self.pool.groups]

    def blocks(self, row: int, indices: Sequence[int]) -> list[list[int]]:
        """Positions index * PAGE to (index + 1) * PAGE of a row for each index: a page of each group, held once more or a copy.

        The row must hold them and not have gone more than a chunk beyond them; copies are of free pages.
        """
        columns: list[np.ndarray] = []
        try:
            for number, (group, table) in enumerate(zip(self.pool.groups, self.tables, strict=True)):
                pages = table[row, np.array(indices, np.int64) % group.ring]
                if group.wraps:
                    columns.append(group.take(len(pages)))
                    self.pool.copy(number, pages, columns[-1])
                else:
                    group.hold(pages)
                    columns.append(pages)
        except BaseException:  # memory may end while copying
            for group, pages in zip(self.pool.groups, columns, strict=False):
                group.release(pages)
            raise
        return np.array(columns).T.tolist()

    def load(self, row: int, blocks: Sequence[list[int]], last_token: int) -> None:
        """Fill an empty row with the blocks of a prefix that ends with last_token; `missing` says what must be free."""
        for number, (group, table, held) in enumerate(
            zip(self.pool.groups, self.tables, self._held, strict=True)
        ):
            first = max(0, len(blocks) - group.ring)
            pages = np.array([block[number] for block in blocks[first:]], np.int32)
            if group.wraps:
                own = group.take(len(pages))
            else:
                group.hold(pages)
                own = pages
            table[row, np.arange(first, len(blocks)) % group.ring] = own
            held[row] = len(own)
            if group.wraps:
                self.pool.copy(number, pages, own)
        if self.previous is not None:
            self.previous[row] = self.model.embed(torch.tensor([[last_token]], device=self.device))[0]
        self.positions[row] = len(blocks) * PAGE
        self.version += 1

    # --- forward -------------------------------------------------------------------------------------

    def read(self, first: int, spans: Sequence[Sequence[int]]) -> torch.Tensor:
        """Add some tokens, at least one, to each of the rows from `first` on; logits (rows, V) after the last of each."""
        lengths = [len(span) for span in spans]
        if self._decoder is not None and self.reads_ragged(first, lengths):
            return self._decoder.read(self, first, spans)
        ids = [[*span, *[0] * (max(lengths) - len(span))] for span in spans]
        return self.forward(first, first + len(spans), torch.tensor(ids, device=self.device), lengths)

    def forward(
        self, first: int, last: int, ids: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Add ids (last - first, T), of which lengths are real, to rows; logits (rows, V) after the last."""
        rows = RowSpan(self, first, last)
        logits = self.model.forward(ids, kv_cache=rows, lengths=lengths, last_only=True)
        self.positions[first:last] = rows.positions
        if self.previous is not None and rows.prev_embedding is not None:
            self.previous[first:last] = rows.prev_embedding
        return logits[:, -1]

    def forward_all(self, ids: Sequence[int]) -> torch.Tensor:
        """Add ids to row 0, which is the only one; logits (T, V) after each of them."""
        rows = RowSpan(self, 0, 1)
        logits = self.model.forward(torch.tensor([ids], device=self.device), kv_cache=rows)
        self.positions[:1] = rows.positions
        return logits[0]

    def rewind(self, row: int, position: int, last_token: int) -> None:
        """Put a row back to a position, not more than a chunk before its own; last_token is the one before it."""
        self.positions[row] = position
        if self.previous is not None:
            self.previous[row] = self.model.embed(torch.tensor([[last_token]], device=self.device))[0]

    def decode(self, rows: int, ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Add one token to each of the first rows; logits (rows, V) after it. ids may be on the device, (rows,)."""
        if self._decoder is not None:
            return self._decoder.step(self, rows, ids)
        return self.forward(0, rows, torch.as_tensor(ids, device=self.device)[:, None])


class RowSpan:
    """Consecutive rows, as the cache of one forward pass."""

    def __init__(self, cache: RowCache, first: int, last: int) -> None:
        self.cache, self.first, self.last = cache, first, last
        self.positions = cache.positions[first:last]
        self.prev_embedding = None if cache.previous is None else cache.previous[first:last]
        self._slots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of each group
        self._pages: dict[int, torch.Tensor] = {}

    def begin(self, width: int, lengths: Sequence[int] | None = None) -> Chunk:
        """Describe a chunk of `width` new tokens per row of which `lengths` (default all) are real."""
        real = real_lengths(len(self.positions), width, lengths)
        return Chunk(list(self.positions), real, width, self.cache.device, self.cache.pool.rings)

    def insert(self, layer: int, chunk: Chunk, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write a chunk's k, v (B, T, H, D).

        Padding is written too: it lies behind the row's position, on page 0 where the row ends there, is masked, and is
        overwritten later.
        """
        pool = self.cache.pool
        number = pool.group_of[layer]
        if number not in self._slots:
            self._slots[number] = self._find(number, chunk)
        pages, slots = self._slots[number]
        pool.keys[layer][pages, slots] = k.to(pool.dtype)
        pool.values[layer][pages, slots] = v.to(pool.dtype)

    def _find(self, number: int, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and slot in it of each new token, (B, T) each."""
        table = self.cache.tables[number][self.first : self.last]
        positions = np.array(chunk.start)[:, None] + np.arange(chunk.width)
        pages = np.take_along_axis(table, positions // PAGE % table.shape[1], 1)
        return self._index(pages), self._index(positions % PAGE)

    def visible(self, layer: int, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values (B, slots, H, D) that may be seen after a chunk; a view where one row's pages adjoin."""
        pool = self.cache.pool
        keys, values, number = pool.keys[layer], pool.values[layer], pool.group_of[layer]
        slots = chunk.num_slots(self.cache.windows[layer])
        pages = self.cache.tables[number][self.first : self.last, : -(-slots // PAGE)]
        if len(pages) == 1 and (np.diff(pages[0]) == 1).all():
            run = slice(int(pages[0, 0]), int(pages[0, -1]) + 1)
            return keys[run].flatten(0, 1)[None, :slots], values[run].flatten(0, 1)[None, :slots]
        if number not in self._pages:
            self._pages[number] = self._index(pages)
        index = self._pages[number]
        return keys[index].flatten(1, 2)[:, :slots], values[index].flatten(1, 2)[:, :slots]

    def _index(self, numbers: np.ndarray) -> torch.Tensor:
        return upload(numbers.astype(np.int64), self.cache.device)

    def advance(self, lengths: int | Sequence[int]) -> None:
        """Move every row forward by a common or by its own number of positions."""
        steps = [lengths] * len(self.positions) if isinstance(lengths, int) else lengths
        self.positions = [position + step for position, step in zip(self.positions, steps, strict=True)]
