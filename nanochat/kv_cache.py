"""Keys and values of past positions, one row per sequence; rows may stand at different positions.

L layers, B rows, T slots, H key/value heads, D head size. Here are the plain cache and what every cache has;
the engine's, which many requests share and which forgets what windows hide, is in row_cache.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch


class ContextOverflow(ValueError):
    """More positions were asked for than the cache or the rotary table holds."""


@dataclass
class Chunk:
    """What one forward pass adds to the cache: T new positions per row, of which `lengths` are real.

    rings: window -> slots of the layers that have this window, where they may be fewer than the positions:
    position p is in slot p % ring. A ring is longer than its window and a chunk together, so that a chunk,
    its padding included, never overwrites what its own queries see.
    Masks are the same for all layers of a window, so they are made once here.
    """

    start: list[int]
    lengths: list[int]
    width: int
    device: torch.device
    rings: Mapping[int, int] = field(default_factory=dict)
    _masks: dict[int, torch.Tensor | None] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Slots that any row may attend to after this chunk."""
        return max(self.start) + self.width

    @property
    def is_uniform(self) -> bool:
        return all(start == self.start[0] for start in self.start)

    def positions(self) -> torch.Tensor:
        """(B, T) absolute position of each new token, or (1, T) if all rows stand at the same position."""
        steps = torch.arange(self.width, device=self.device)
        starts = self.start[:1] if self.is_uniform else self.start
        return torch.tensor(starts, device=self.device)[:, None] + steps

    def num_slots(self, window: int) -> int:
        """Slots that hold keys after this chunk, in layers of a window."""
        return min(self.total, self.rings.get(window, self.total))

    def mask(self, window: int) -> torch.Tensor | None:
        """(B or 1, 1, T, slots) booleans of the keys that each query sees; None if it sees all of them."""
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def _build_mask(self, window: int) -> torch.Tensor | None:
        if self.width == 1 and self.is_uniform and (window < 0 or window >= self.total - 1):
            return None
        query = self.positions()[:, :, None]
        key = torch.arange(self.num_slots(window), device=self.device)
        if key.numel() < self.total:  # a ring: the last position written to each slot, negative if none was
            last = query[:, -1:]
            key = last - (last - key) % key.numel()
        visible = (key <= query) & (key >= 0)
        if 0 <= window < self.total - 1:
            visible &= query - key <= window
        return visible[:, None]


def real_lengths(rows: int, width: int, lengths: Sequence[int] | None) -> list[int]:
    """How many of `width` new tokens each row really gets; all if lengths is None. Checks them."""
    real = [width] * rows if lengths is None else list(lengths)
    if len(real) != rows or not all(0 < n <= width for n in real):
        raise ValueError(f"lengths {real} do not fit {rows} rows of {width} tokens")
    return real


class Cache(Protocol):
    """What a forward pass needs of a cache. prev_embedding is the state of the smear, see KVCache."""

    prev_embedding: torch.Tensor | None

    def begin(self, width: int, lengths: Sequence[int] | None = None) -> Chunk: ...

    def insert(self, layer: int, chunk: Chunk, k: torch.Tensor, v: torch.Tensor) -> None: ...

    def visible(self, layer: int, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]: ...

    def advance(self, lengths: int | Sequence[int]) -> None: ...


class KVCache:
    """Pre-allocated keys and values: `k_cache` and `v_cache` are (L, B, T, H, D).

    `positions` (host) and `cache_seqlens` (device, int32) hold how many slots of each row are filled.
    `prev_embedding` (B, 1, C) is the state of the smear: the last token's embedding, zeros at the start.
    """

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        seq_len: int,
        head_dim: int,
        num_layers: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.n_layers, self.n_heads, self.head_dim = num_layers, num_heads, head_dim
        self.device = torch.device(device)
        shape = (num_layers, batch_size, seq_len, num_heads, head_dim)
        self.k_cache = torch.zeros(shape, device=self.device, dtype=dtype)
        self.v_cache = torch.zeros_like(self.k_cache)
        self.positions = [0] * batch_size
        self.prev_embedding: torch.Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self.k_cache.size(1)

    @property
    def max_seq_len(self) -> int:
        return self.k_cache.size(2)

    @property
    def nbytes(self) -> int:
        return 2 * self.k_cache.numel() * self.k_cache.element_size()

    @property
    def cache_seqlens(self) -> torch.Tensor:
        return torch.tensor(self.positions, dtype=torch.int32, device=self.device)

    def get_pos(self) -> int:
        """Position of row 0 (all rows share it unless prompts of different lengths were added)."""
        return self.positions[0]

    def remaining(self) -> int:
        """Slots left in the fullest row."""
        return self.max_seq_len - max(self.positions)

    def ensure(self, count: int) -> None:
        """Raise ContextOverflow unless every row can take `count` more positions."""
        if count > self.remaining():
            raise ContextOverflow(
                f"KV cache of {self.max_seq_len} slots is at {max(self.positions)}, cannot take {count} more"
            )

    def get_layer_cache(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (B, T, H, D) of one layer's keys and values."""
        return self.k_cache[layer], self.v_cache[layer]

    def begin(self, width: int, lengths: Sequence[int] | None = None) -> Chunk:
        """Describe a chunk of `width` new tokens per row of which `lengths` (default all) are real."""
        self.ensure(width)
        return Chunk(list(self.positions), real_lengths(self.batch_size, width, lengths), width, self.device)

    def insert(self, layer: int, chunk: Chunk, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write a chunk's k, v (B, T, H, D).

        Padding is written too: it lies behind the row's position, is masked, and is overwritten later.
        """
        k_cache, v_cache = self.get_layer_cache(layer)
        if chunk.is_uniform:
            span = slice(chunk.start[0], chunk.total)
            k_cache[:, span], v_cache[:, span] = k, v
        else:
            rows, slots = torch.arange(self.batch_size, device=self.device)[:, None], chunk.positions()
            k_cache[rows, slots], v_cache[rows, slots] = k.to(k_cache.dtype), v.to(v_cache.dtype)

    def visible(self, layer: int, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values (B, total, H, D) that may be seen after a chunk."""
        k_cache, v_cache = self.get_layer_cache(layer)
        return k_cache[:, : chunk.total], v_cache[:, : chunk.total]

    def advance(self, lengths: int | Sequence[int]) -> None:
        """Move every row forward by a common or by its own number of positions."""
        steps = [lengths] * self.batch_size if isinstance(lengths, int) else lengths
        self.positions = [position + step for position, step in zip(self.positions, steps, strict=True)]

    def reset(self) -> None:
        """Empty all rows; the memory is kept."""
        self.positions = [0] * self.batch_size
        self.prev_embedding = None

    def prefill(self, other: KVCache) -> None:
        """Start from another cache's contents; a single source row is copied to all rows."""
        if any(self.positions):
            raise ValueError(f"prefill needs an empty cache, this one is at {self.positions}")
        same = (self.n_layers, self.n_heads, self.head_dim) == (other.n_layers, other.n_heads, other.head_dim)
        if not same or other.batch_size not in (1, self.batch_size):
            raise ValueError(f"cannot fill {tuple(self.k_cache.shape)} from {tuple(other.k_cache.shape)}")
        filled = max(other.positions)
        self.ensure(filled)
        self.k_cache[:, :, :filled] = other.k_cache[:, :, :filled]
        self.v_cache[:, :, :filled] = other.v_cache[:, :, :filled]
        self.positions = list(other.positions) * (self.batch_size // other.batch_size)
        if other.prev_embedding is not None:
            self.prev_embedding = other.prev_embedding.expand(self.batch_size, -1, -1).clone()

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.k_cache, self.v_cache = self.k_cache[:, index], self.v_cache[:, index]
        self.positions = [self.positions[row] for row in rows]
        if self.prev_embedding is not None:
            self.prev_embedding = self.prev_embedding[index]
