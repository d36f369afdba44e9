"""The engine's keys and values: rows of running requests that come, grow, move and go within a memory budget.

Every layer has its own tensors, so that a layer with a sliding window keeps a ring of slots that is little
longer than its window, and so that growing needs only one layer's memory twice. What a row holds can be taken
out and put back in blocks, which is how prefixes are reused. B rows, T slots, H key/value heads, D head size,
L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from nanochat.cpu_decode import CpuDecoder
from nanochat.cuda_decode import CudaDecoder
from nanochat.flash_attention import describe_backend
from nanochat.kv_cache import Cache, Chunk, real_lengths
from nanochat.machine import total_ram
from nanochat.network_config import GPTConfig

BLOCK = 32  # positions per block of a reusable prefix
SLOT_STEP = 64  # lengths are multiples of this, so that growing is rare


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


def round_up(count: int, step: int) -> int:
    """The smallest multiple of step that is not below count."""
    return -(-count // step) * step


def default_cache_bytes(device: torch.device) -> int:
    """Memory for keys and values: on a GPU 80 % of what is free, elsewhere a quarter of the machine's or container's."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(0.8 * (torch.cuda.mem_get_info(device)[0] + cached))
    return total_ram() // 4


class RowCache:
    """Rows 0, 1, ... are in use; `positions` says how many tokens each of them holds.

    max_width is the widest chunk that a forward pass may add to a row.
    """

    def __init__(self, model: CachedModel, max_rows: int, max_width: int) -> None:
        config = model.config
        self.model, self.max_rows = model, max_rows
        self.windows = config.window_sizes
        # A block more than window and chunk, so that a chunk's padding spares the block before it.
        self.rings = {
            window: round_up(window + max_width + BLOCK, SLOT_STEP)
            for window in self.windows
            if window < config.sequence_len
        }
        self.device, self.dtype = model.get_device(), model.compute_dtype
        self.positions: list[int] = []
        self.num_rows = self.num_slots = 0  # what there is room for
        self._heads = (config.n_kv_head, config.head_dim)
        self.keys = [self._empty(0, 0) for _ in self.windows]
        self.values = [self._empty(0, 0) for _ in self.windows]
        self.previous = self._zeros(0, 1, config.n_embd) if config.use_smear else None
        self.generation = 0  # counts how often the tensors have been replaced
        self._decoder = CpuDecoder.of(model) or CudaDecoder.of(model)

    def _zeros(self, *shape: int) -> torch.Tensor:
        # Not uninitialised: a NaN in a hidden slot would survive its weight of zero.
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _empty(self, rows: int, slots: int) -> torch.Tensor:
        return self._zeros(rows, slots, *self._heads)

    @property
    def can_run_ahead(self) -> bool:
        """Whether a step can be started without waiting for the one before."""
        return isinstance(self._decoder, CudaDecoder)

    def reads_ragged(self, first: int, counts: Sequence[int]) -> bool:
        """Whether the rows from `first` on can read so many tokens each without being padded to one length."""
        return isinstance(self._decoder, CpuDecoder) and self._decoder.reads(self.positions[first:], counts)

    def describe_attention(self) -> str:
        """What computes the attention of prompts and of decoding, for the log."""
        if self.device.type == "cpu":  # elsewhere no sequence that starts a cache is special, see gpt.py
            prompts = describe_backend(self.device, self.dtype)
        else:
            prompts = "torch SDPA"
        if isinstance(self._decoder, CpuDecoder):
            return f"prompts: {prompts}; short prompts and decoding: our C++ step"
        decoding = "torch SDPA" if self._decoder is None else "our Triton kernel"
        return f"prompts: {prompts}; decoding: {decoding}"

    # --- memory --------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take now."""
        return self.bytes_for(self.num_rows, self.num_slots)

    def bytes_for(self, rows: int, tokens: int) -> int:
        """Bytes of keys and values for rows of a number of tokens."""
        slots = sum(self._layer_slots(window, round_up(tokens, SLOT_STEP)) for window in self.windows)
        heads, head_dim = self._heads
        return 2 * rows * slots * heads * head_dim * self.dtype.itemsize

    def _layer_slots(self, window: int, slots: int) -> int:
        return min(slots, self.rings.get(window, slots))

    def reserve(self, rows: int, tokens: int, max_bytes: int) -> None:
        """Make room for rows of a number of tokens, with room to grow where max_bytes allow it."""
        tokens = round_up(tokens, SLOT_STEP)
        if rows <= self.num_rows and tokens <= self.num_slots and self.nbytes <= max_bytes:
            return
        more_rows = rows if rows <= self.num_rows else max(rows, min(2 * self.num_rows, self.max_rows))
        more_slots = tokens if tokens <= self.num_slots else max(tokens, 2 * self.num_slots)
        more_rows, more_slots = max(more_rows, self.num_rows), max(more_slots, self.num_slots)
        for shape in ((more_rows, more_slots), (rows, more_slots), (more_rows, tokens)):
            if self.bytes_for(*shape) <= max_bytes:
                return self._resize(*shape)
        self._resize(rows, tokens)

    def shrink(self) -> None:
        """Give back the memory of rows that have gone, unless they may soon be wanted again."""
        if not self.positions:
            self._resize(0, 0)
        elif 4 * len(self.positions) <= self.num_rows:
            self._resize(2 * len(self.positions), self.num_slots)

    def _resize(self, rows: int, slots: int) -> None:
        used = len(self.positions)
        if (rows, slots) == (self.num_rows, self.num_slots):
            return
        for tensors in (self.keys, self.values):
            for layer, window in enumerate(self.windows):
                new = self._empty(rows, self._layer_slots(window, slots))
                kept = min(new.size(1), tensors[layer].size(1))
                new[:used, :kept] = tensors[layer][:used, :kept]
                tensors[layer] = new
        if self.previous is not None:
            new = self._zeros(rows, 1, self.previous.size(2))
            new[:used] = self.previous[:used]
            self.previous = new
        self.num_rows, self.num_slots = rows, slots
        self.generation += 1

    # --- rows ----------------------------------------------------------------------------------------

    def add_row(self) -> int:
        """Begin an empty row in reserved room; its number."""
        row = len(self.positions)
        self.positions.append(0)
        if self.previous is not None:
            self.previous[row] = 0
        return row

    def copy_row(self, source: int) -> int:
        """Begin a row that equals another one; its number."""
        row = self.add_row()
        self._assign(row, source)
        return row

    def remove_row(self, row: int) -> None:
        """End a row; the last one takes its place."""
        last = len(self.positions) - 1
        if row != last:
            self._assign(row, last)
        self.positions.pop()

    def swap_rows(self, a: int, b: int) -> None:
        """Exchange what two rows hold."""
        filled = max(self.positions[a], self.positions[b])
        for tensor in (*self.keys, *self.values):
            tensor[[a, b], :filled] = tensor[[b, a], :filled]
        if self.previous is not None:
            self.previous[[a, b]] = self.previous[[b, a]]
        self.positions[a], self.positions[b] = self.positions[b], self.positions[a]

    def _assign(self, row: int, source: int) -> None:
        filled = self.positions[source]
        for tensor in (*self.keys, *self.values):
            tensor[row, :filled] = tensor[source, :filled]
        if self.previous is not None:
            self.previous[row] = self.previous[source]
        self.positions[row] = filled

    # --- blocks --------------------------------------------------------------------------------------

    @property
    def block_bytes(self) -> int:
        """Size of one block."""
        heads, head_dim = self._heads
        return 2 * len(self.windows) * BLOCK * heads * head_dim * self.dtype.itemsize

    def block(self, row: int, index: int) -> torch.Tensor:
        """Copy of positions index * BLOCK to (index + 1) * BLOCK of a row: (2 L, BLOCK, H, D).

        The row must hold them and not have gone more than a chunk beyond them.
        """
        parts = []
        for tensor, window in zip((*self.keys, *self.values), 2 * self.windows, strict=True):
            slot = index * BLOCK % self.rings.get(window, self.num_slots)
            parts.append(tensor[row, slot : slot + BLOCK])
        return torch.stack(parts)

    def load(self, row: int, blocks: Sequence[torch.Tensor], last_token: int) -> None:
        """Fill an empty row with the blocks of a prefix that ends with last_token."""
        tokens = len(blocks) * BLOCK
        whole = torch.cat(list(blocks), dim=1)
        for part, tensor, window in zip(whole, (*self.keys, *self.values), 2 * self.windows, strict=True):
            ring = self.rings.get(window, self.num_slots)
            first = max(0, tokens - ring)
            slots = torch.arange(first, tokens, device=self.device) % ring
            tensor[row, slots] = part[first:]
        if self.previous is not None:
            self.previous[row] = self.model.embed(torch.tensor([[last_token]], device=self.device))[0]
        self.positions[row] = tokens

    # --- forward -------------------------------------------------------------------------------------

    def read(self, first: int, spans: Sequence[Sequence[int]]) -> torch.Tensor:
        """Add some tokens, at least one, to each of the rows from `first` on; logits (rows, V) after the last of each."""
        lengths = [len(span) for span in spans]
        if isinstance(self._decoder, CpuDecoder) and self._decoder.reads(self.positions[first:], lengths):
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

    def get_layer_cache(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (B, T, H, D) of one layer's keys and values."""
        span = slice(self.first, self.last)
        return self.cache.keys[layer][span], self.cache.values[layer][span]

    def begin(self, width: int, lengths: Sequence[int] | None = None) -> Chunk:
        """Describe a chunk of `width` new tokens per row of which `lengths` (default all) are real."""
        real = real_lengths(len(self.positions), width, lengths)
        chunk = Chunk(list(self.positions), real, width, self.cache.device, self.cache.rings)
        assert chunk.total <= self.cache.num_slots, (chunk.total, self.cache.num_slots)
        return chunk

    def insert(
        self, layer: int, chunk: Chunk, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a chunk's k, v (B, T, H, D); return the slots (B, slots, H, D) that may be seen.

        Padding is written too: it lies behind the row's position, is masked, and is overwritten later.
        """
        keys, values = self.get_layer_cache(layer)
        window = self.cache.windows[layer]
        visible = chunk.num_slots(window)
        start = chunk.start[0] % self.cache.rings.get(window, chunk.total)
        if chunk.is_uniform and start + chunk.width <= visible:
            keys[:, start : start + chunk.width], values[:, start : start + chunk.width] = k, v
        else:
            rows = torch.arange(len(self.positions), device=k.device)[:, None]
            slots = chunk.slots(window)
            keys[rows, slots], values[rows, slots] = k.to(keys.dtype), v.to(values.dtype)
        return keys[:, :visible], values[:, :visible]

    def advance(self, lengths: int | Sequence[int]) -> None:
        """Move every row forward by a common or by its own number of positions."""
        steps = [lengths] * len(self.positions) if isinstance(lengths, int) else lengths
        self.positions = [position + step for position, step in zip(self.positions, steps, strict=True)]
