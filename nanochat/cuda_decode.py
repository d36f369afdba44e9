"""The decode step of NVIDIA GPUs: few kernels, recorded once as a CUDA graph for each number of rows, then replayed.

It takes the place of the network's forward pass where every running row gets one token. The host only copies ids,
positions and tables of pages; started one by one, the kernels of a step would take many times longer to start than to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanochat.cuda_graphs import Graphs, kernels_run
from nanochat.cuda_network import LOG2_E, CudaNetwork
from nanochat.cuda_read import PromptReader
from nanochat.gpt import GPT, NORM_EPS, GPTConfig
from nanochat.page_pool import PAGE
from nanochat.quantize import weight_layers

if TYPE_CHECKING:
    from nanochat.row_cache import RowCache

_PROGRAMS = (
    660  # attention is split into at most so many: an H100 runs 5 on each multiprocessor at the same time
)
_BLOCK = 16  # keys at a time; 32 take so many registers that only 3 do
_MAX_PARTS = 64
_IN_FLIGHT = 8  # copies of ids, positions and tables that the GPU may not have read yet


def bucket(rows: int) -> int:
    """The number of rows that a step of `rows` is padded to; each has a graph of its own."""
    return 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64


class CudaDecoder:
    """One network, ready for decode steps. use_graphs: record and replay; without, kernels are started one by one."""

    def __init__(self, model: GPT, use_graphs: bool = True) -> None:
        self._model, self._device = model, model.get_device()
        self._network = CudaNetwork(model)
        self._reader = PromptReader(self._network, use_graphs)
        self._graphs = Graphs(self._device, use_graphs)
        self._ids = torch.zeros(0, dtype=torch.long, device=self._device)
        self._positions = torch.zeros(0, dtype=torch.long, device=self._device)
        self._tables: list[Tensor] = []  # pages of the rows, for each group of layers
        self._staged: list[tuple[Tensor, list[Tensor]]] = []
        self._generation = -1
        self._loaded: tuple[int, int] | None = None  # version and rows of the tables
        self._steps = 0
        self._on_device = nullcontext()
        if self._device.type == "cuda":  # Triton starts kernels on the current one, which may be another
            self._on_device = torch.cuda.device(self._device)

    @classmethod
    def of(cls, model: object) -> CudaDecoder | None:
        """A decoder, or None where the model, its device or this machine is none that it can serve."""
        if not isinstance(model, GPT) or model.get_device().type != "cuda" or not is_suitable(model):
            return None
        return cls(model) if kernels_run(model.get_device()) else None

    def step(self, cache: RowCache, rows: int, ids: Sequence[int] | Tensor) -> Tensor:
        """Add one token to each of the first rows of a cache; logits (rows, V) fp32 after it. Does not wait."""
        padded, longest = bucket(rows), max(cache.positions[:rows]) + 1
        span = max(64, 1 << (longest - 1).bit_length())  # a bound of the positions, which the graph relies on
        with self._on_device:
            self._follow(cache)
            self._load(cache, rows, ids, padded)
            logits = self._graphs.run((padded, span), lambda: self._forward(cache, padded, span))
        cache.positions[:rows] = [position + 1 for position in cache.positions[:rows]]
        return logits[:rows].clone()

    def reads(self, positions: Sequence[int], counts: Sequence[int]) -> bool:
        """Whether `read` is to be taken for so many tokens at these positions of some rows: always, if it runs at all."""
        with self._on_device:
            return self._reader.runs

    def read(self, cache: RowCache, first: int, spans: Sequence[Sequence[int]]) -> Tensor:
        """Add some tokens, at least one, to each of the rows from `first` on; logits (rows, V) fp32 after the last of each."""
        with self._on_device:
            self._follow(cache)
            return self._reader.read(cache, first, spans)

    def _follow(self, cache: RowCache) -> None:
        """Forget the graphs where the pool's tensors are others than theirs."""
        if cache.pool.generation != self._generation:
            self._forget_graphs()
            self._generation = cache.pool.generation

    def _forget_graphs(self) -> None:
        self._graphs.forget()
        self._reader.graphs.forget()

    def _load(self, cache: RowCache, rows: int, ids: Sequence[int] | Tensor, padded: int) -> None:
        """Bring ids, positions and tables of pages to where the graph reads them.

        Rows of the padding are at position 0 of page 0, which is nobody's.
        """
        if len(self._ids) < padded or not self._tables:
            self._allocate(cache, max(bucket(cache.max_rows), padded))
        self._steps += 1
        staged, tables = self._staged[self._steps % _IN_FLIGHT]
        staged[0, :rows], staged[0, rows:padded] = torch.tensor(cache.positions[:rows]), 0
        self._positions[:padded].copy_(staged[0, :padded], non_blocking=True)
        if isinstance(ids, Tensor):
            self._ids[:rows].copy_(ids)
        else:
            staged[1, :rows] = torch.tensor(ids)
            self._ids[:rows].copy_(staged[1, :rows], non_blocking=True)
        if self._loaded == (cache.version, rows):
            return
        if self._loaded is None or self._loaded[1] != rows:
            self._real[:rows], self._real[rows:] = True, False
        for own, target, table in zip(tables, self._tables, cache.tables, strict=True):
            own[:rows], own[rows:padded] = torch.from_numpy(table[:rows]), 0
            target[:padded].copy_(own[:padded], non_blocking=True)
        self._loaded = cache.version, rows

    def _allocate(self, cache: RowCache, size: int) -> None:
        def pinned(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=self._device.type == "cuda")

        rings = [table.shape[1] for table in cache.tables]
        self._ids, self._positions = self._ids.new_zeros(size), self._positions.new_zeros(size)
        self._real = torch.zeros(size, 1, 1, dtype=torch.bool, device=self._device)
        self._tables = [self._ids.new_zeros(size, ring, dtype=torch.int32) for ring in rings]
        self._staged = [
            (pinned(2, size, dtype=torch.long), [pinned(size, ring, dtype=torch.int32) for ring in rings])
            for _ in range(_IN_FLIGHT)
        ]
        self._loaded = None
        self._network.reserve(size * self._model.config.n_head)
        self._forget_graphs()

    # --- the network ---------------------------------------------------------------------------------

    def _forward(self, cache: RowCache, rows: int, span: int) -> Tensor:
        """logits (rows, V) after one more token of each row, the padding among them; no position reaches span."""
        model = self._model
        ids, positions = self._ids[:rows], self._positions[:rows]
        x = model.embed(ids)
        if cache.previous is not None:
            previous = cache.previous[:rows]
            smeared = self._network.smeared(x, previous[:, 0])
            previous.copy_(torch.where(self._real[:rows], x[:, None], previous))
            x = smeared

        def attend(layer: int, qkv: Tensor, x_in: Tensor) -> Tensor:
            return self._attend(cache, layer, qkv, x_in, ids, positions, span)

        return self._network.blocks(x, attend)

    def _attend(
        self,
        cache: RowCache,
        layer: int,
        qkv: Tensor,
        x_in: Tensor,
        ids: Tensor,
        positions: Tensor,
        span: int,
    ) -> Tensor:
        """Attention of one new token of each row."""
        network, model, config = self._network, self._model, self._model.config
        rows, heads, kv_heads, dim = len(qkv), config.n_head, config.n_kv_head, config.head_dim
        q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
        keys, values = cache.pool.keys[layer], cache.pool.values[layer]
        pages = self._tables[cache.pool.group_of[layer]]
        slots = pages.size(1) * PAGE
        parts = min(max(_PROGRAMS // (rows * heads), 1), -(-min(span, slots) // _BLOCK), _MAX_PARTS)
        sums = qkv.new_empty(rows * heads * parts if parts > 1 else 0, dtype=torch.float32)
        partial = qkv.new_empty(len(sums) * dim, dtype=torch.float32)
        y = qkv.new_empty(rows, heads * dim)
        network.kernels.attend[rows, heads, parts](
            q, k, v, keys, values, pages, positions, model.cos, model.sin, ids, *network.gate(layer, x_in), sums, partial,
            network.arrived, y, qkv.stride(0), pages.stride(0), keys.stride(1), slots, model.blocks[layer].attn.window,
            config.kv_width, x_in.stride(0), NORM_EPS, config.qk_scale, config.ve_gate_scale, _largest_score(config),
            GROUP=heads // kv_heads, DIM=dim, GATE=network.gate_channels(layer), PAGE=PAGE, BLOCK=_BLOCK,
            PARTS=1 << (parts - 1).bit_length(), num_warps=2 if rows == 1 else 4, **network.overlap(rows),
        )  # fmt: skip
        return y


def _largest_score(config: GPTConfig) -> float:
    """Bound of a score in units of log2(e): queries and keys have the root mean square qk_scale."""
    return config.head_dim**0.5 * config.qk_scale**2 * LOG2_E


def is_suitable(model: GPT) -> bool:
    """Whether all sizes fit the kernels' blocks and every module is one that they know."""
    config = model.config
    if config.head_dim & (config.head_dim - 1) or not 16 <= config.head_dim <= 256 or config.n_embd % 8:
        return False
    if (
        config.ve_gate_channels > 32 or 2 * _largest_score(config) > 120
    ):  # beyond, fp32 would lose small weights
        return False
    layers = weight_layers(model)
    if layers is None:
        return False
    kinds = [{type(m) for m in (b.attn.c_q, b.attn.c_k, b.attn.c_v)} for b in model.blocks]
    tensors = [layer.weight for layer in layers]
    return all(len(kind) == 1 for kind in kinds) and all(
        isinstance(tensor, Tensor) and tensor.is_contiguous() for tensor in tensors
    )
