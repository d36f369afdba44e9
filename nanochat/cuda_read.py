"""Prompts on NVIDIA GPUs: tokens of many rows in one line, each row as many as it has, without padding.

PyTorch takes dozens of kernels for a layer, and starting them takes longer than a GPU computes; here they are eleven,
and sizes that come again are recorded as CUDA graphs. Keys and values go into their pages, and attention reads them there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nanochat.common import upload
from nanochat.cuda_graphs import Graphs, works
from nanochat.cuda_network import LOG2_E, CudaNetwork
from nanochat.gpt import NORM_EPS
from nanochat.page_pool import PAGE

if TYPE_CHECKING:
    from nanochat.row_cache import RowCache

_ALIGNMENT = 4  # numbers of 4 bytes; kernels are compiled for addresses that 16 divides


class PromptReader:
    """Reads chunks of prompts with a network."""

    def __init__(self, network: CudaNetwork, use_graphs: bool = True) -> None:
        self._network, self._model = network, network.model
        device, itemsize = self._model.get_device(), self._model.compute_dtype.itemsize
        self.graphs = Graphs(device, use_graphs, after=2)  # most sizes of prompts come only once
        self._inputs: dict[tuple[int, int], Tensor] = {}  # of the graph of so many tokens and rows
        shared, has_tensor_cores = 48 << 10, itemsize < 4
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
            has_tensor_cores &= properties.major >= 8  # Triton does without on older ones
        self._block_m, self._block_n, self._stages = _tile(
            self._model.config.head_dim, itemsize, shared, has_tensor_cores
        )

    @functools.cached_property
    def runs(self) -> bool:
        """Whether attention of prompts compiles for this GPU; tried once."""
        config, device, dtype = self._model.config, self._model.get_device(), self._model.compute_dtype
        queries = torch.zeros(1, config.n_head * config.head_dim, dtype=dtype, device=device)
        keys = torch.zeros(1, PAGE, config.n_kv_head, config.head_dim, dtype=dtype, device=device)
        numbers = torch.zeros(2, 16, dtype=torch.int32, device=device)
        numbers[1, 3] = 1  # one token at position 0, on page 0
        return works(
            lambda: self._attend_tiles(
                queries, keys, keys, numbers[:1], numbers[1:, :4], config.sequence_len, PAGE
            ),
            otherwise="reading prompts with PyTorch",
        )

    def read(self, cache: RowCache, first: int, spans: Sequence[Sequence[int]]) -> Tensor:
        """Add some tokens, at least one, to each of the rows from `first` on; logits (rows, V) fp32 after the last of each."""
        counts, starts = [len(span) for span in spans], cache.positions[first : first + len(spans)]
        ends = np.cumsum(counts)
        tokens, rows = _padded(int(ends[-1])), _padded_rows(len(spans))
        # What is added to the rows repeats the first; tokens that are added are on page 0, which is nobody's.
        wanted = np.pad(np.arange(len(spans)), (0, rows - len(spans)))
        host = _side_by_side(
            _filled(tokens, np.fromiter(chain.from_iterable(spans), np.int32, ends[-1])),
            _filled(tokens, np.repeat(np.arange(len(spans)), counts), rows),
            _filled(
                tokens, np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
            ),
            first + wanted,
            (ends - counts)[wanted],
            ends[wanted] - 1,
            _filled(tokens // self._block_m + rows, self._tiles(starts, counts)),
            *(_filled(rows + 1, table[first : first + len(spans)]) for table in cache.tables),
        )
        if (tokens, rows) not in self._inputs:
            self._inputs[tokens, rows] = torch.zeros(len(host), dtype=torch.int32, device=cache.device)
        self._inputs[tokens, rows].copy_(upload(host, cache.device))
        logits = self.graphs.run((tokens, rows), lambda: self._forward(cache, tokens, rows))
        cache.positions[first : first + len(spans)] = [s + n for s, n in zip(starts, counts, strict=True)]
        return logits[: len(spans)].clone()

    def _forward(self, cache: RowCache, tokens: int, rows: int) -> Tensor:
        """logits (rows, V) after the last token of each row, of what was put into the inputs of that size."""
        sizes = [(tokens,)] * 3 + [(rows,)] * 3 + [(tokens // self._block_m + rows, 4)]
        ids, rows_of, positions, slots, begins, last, tiles, *tables = _views(
            self._inputs[tokens, rows], sizes + [(rows + 1, table.shape[1]) for table in cache.tables]
        )
        x = self._model.embed(ids)
        if cache.previous is not None:
            previous = torch.cat([x[:1], x[:-1]])
            previous[begins] = cache.previous[slots, 0]
            cache.previous[slots, 0] = x[last]
            x = self._network.smeared(x, previous)

        def attend(layer: int, qkv: Tensor, x_in: Tensor) -> Tensor:
            pages = tables[cache.pool.group_of[layer]]
            return self._attend(cache, layer, qkv, x_in, ids, rows_of, positions, tiles, pages)

        return self._network.blocks(x, attend, last)

    def _tiles(self, starts: Sequence[int], counts: Sequence[int]) -> np.ndarray:
        """(n, 4): row, first token, its position and number of tokens of each tile; the longest come first."""
        tiles, begin = [], 0
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            for offset in range(0, count, self._block_m):
                tiles.append((row, begin + offset, start + offset, min(count - offset, self._block_m)))
            begin += count
        return np.array(sorted(tiles, key=lambda tile: -tile[2]))

    def _attend(
        self, cache: RowCache, layer: int, qkv: Tensor, x_in: Tensor, ids: Tensor, rows: Tensor, positions: Tensor,
        tiles: Tensor, pages: Tensor,
    ) -> Tensor:  # fmt: skip
        """Attention (tokens, C) of a layer after queries, keys and values have got their place."""
        network, model, config = self._network, self._model, self._model.config
        heads, kv_heads, dim = config.n_head, config.n_kv_head, config.head_dim
        keys, values = cache.pool.keys[layer], cache.pool.values[layer]
        slots = pages.size(1) * PAGE
        queries = qkv.new_empty(len(qkv), heads * dim)
        network.kernels.place[(len(qkv),)](
            qkv, queries, keys, values, pages, rows, positions, model.cos, model.sin, ids, *network.gate(layer, x_in),
            qkv.stride(0), pages.stride(0), keys.stride(1), slots, config.kv_width, x_in.stride(0), NORM_EPS,
            config.qk_scale, config.ve_gate_scale, HEADS=heads, KV_HEADS=kv_heads, DIM=dim,
            GATE=network.gate_channels(layer), PAGE=PAGE, BLOCK_Q=1 << (heads - 1).bit_length(),
            BLOCK_K=1 << (kv_heads - 1).bit_length(), num_warps=4,
        )  # fmt: skip
        return self._attend_tiles(queries, keys, values, pages, tiles, model.blocks[layer].attn.window, slots)

    def _attend_tiles(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        pages: Tensor,
        tiles: Tensor,
        window: int,
        slots: int,
    ) -> Tensor:
        # Zeros for the tokens of the padding, which are in no tile: what is not a number would be kept on page 0.
        config, out = self._model.config, torch.zeros_like(queries)
        self._network.kernels.attend_prompt[len(tiles), config.n_head](
            queries, keys, values, pages, tiles, out, pages.stride(0), keys.stride(1), slots, window,
            LOG2_E / config.head_dim**0.5, HEADS=config.n_head, GROUP=config.n_head // config.n_kv_head,
            DIM=config.head_dim, PAGE=PAGE, BLOCK_M=self._block_m, BLOCK_N=self._block_n, num_warps=4,
            num_stages=self._stages,
        )  # fmt: skip
        return out


def _tile(head_dim: int, itemsize: int, shared: int, has_tensor_cores: bool) -> tuple[int, int, int]:
    """(queries, keys, stages) of a program of attend_prompt that fit the shared memory of a GPU: its queries, and keys and values of each stage."""
    sizes = [(64, 64, 2), (64, 32, 2), (32, 32, 2), (32, 32, 1), (16, 16, 1)]
    if not has_tensor_cores:  # more would not be faster, and from heads of 128 on not fit the registers
        sizes = sizes[2:] if head_dim < 128 else sizes[4:]
    fitting = [(m, n, s) for m, n, s in sizes if head_dim * itemsize * (m + 2 * n * s) <= shared]
    return fitting[0] if fitting else sizes[-1]


def _padded(tokens: int) -> int:
    """What a number of tokens is padded to, so that sizes come again: little, where they are many."""
    return max(16, 1 << (tokens - 1).bit_length()) if tokens <= 256 else -(-tokens // 256) * 256


def _padded_rows(rows: int) -> int:
    """The next power of four."""
    return 4 ** -(-(rows - 1).bit_length() // 2)


def _filled(length: int, array: np.ndarray, value: int = 0) -> np.ndarray:
    """An array with as many entries more, of one value, as it lacks."""
    return np.concatenate([array, np.full((length - len(array), *array.shape[1:]), value, array.dtype)])


def _places(sizes: Sequence[int]) -> list[int]:
    """Where arrays of so many numbers begin that lie side by side, and where the last one ends."""
    return np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]).tolist()


def _side_by_side(*arrays: np.ndarray) -> np.ndarray:
    """All as int32 in one, so that they are copied at once."""
    places = _places([array.size for array in arrays])
    whole = np.zeros(places[-1], np.int32)
    for array, place in zip(arrays, places, strict=False):
        whole[place : place + array.size] = array.ravel()
    return whole


def _views(whole: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The arrays of these shapes that lie side by side."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    return [
        whole[place : place + size].view(shape)
        for shape, size, place in zip(shapes, sizes, _places(sizes), strict=False)
    ]
