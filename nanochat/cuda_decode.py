"""The decode step of NVIDIA GPUs: few kernels, recorded once as a CUDA graph for each number of rows, then replayed.

It takes the place of the network's forward pass where every running row gets one token. The host only copies ids,
positions and tables of pages; started one by one, the kernels of a step would take many times longer to start than to run. Weights are
used where they lie, so that training in place is seen.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.gpt import GPT, NORM_EPS, SMEAR_CHANNELS, Attention, GPTConfig, Linear
from nanochat.page_pool import PAGE
from nanochat.quantize import QuantizedLinear, weight_layers

if TYPE_CHECKING:
    from nanochat.row_cache import RowCache

_PROGRAMS = 1024  # attention is split into about so many, several for each multiprocessor
_MAX_PARTS = 64
_LOG2_E = 1.4426950408889634
_IN_FLIGHT = 8  # copies of ids, positions and tables that the GPU may not have read yet
_MOST_ROWS = 64  # that quantised matrices are multiplied with as they lie; beyond, they are widened first
_ENOUGH = 264  # programs of such a product, two for each multiprocessor of an H100; below, K is split


def bucket(rows: int) -> int:
    """The number of rows that a step of `rows` is padded to; each has a graph of its own."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step


class CudaDecoder:
    """One network, ready for decode steps. use_graphs: record and replay; without, kernels are started one by one."""

    def __init__(self, model: GPT, use_graphs: bool = True) -> None:
        self._model, self._use_graphs, self._kernels = model, use_graphs, _kernels()
        self._device = model.get_device()
        self._ids = torch.zeros(0, dtype=torch.long, device=self._device)
        self._positions = torch.zeros(0, dtype=torch.long, device=self._device)
        self._tables: list[Tensor] = []  # pages of the rows, for each group of layers
        self._staged: list[tuple[Tensor, list[Tensor]]] = []
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._generation = -1
        self._loaded: tuple[int, int] | None = None  # version and rows of the tables
        self._steps = 0
        self._arrived = torch.zeros(_ENOUGH, dtype=torch.int32, device=self._device)
        self._on_device = nullcontext()
        if self._device.type == "cuda":  # Triton starts kernels on the current one, which may be another
            self._on_device = torch.cuda.device(self._device)
        if use_graphs:
            self._stream = torch.cuda.Stream(self._device)

    @classmethod
    def of(cls, model: object) -> CudaDecoder | None:
        """A decoder, or None where the model, its device or this machine is none that it can serve."""
        if not isinstance(model, GPT) or model.get_device().type != "cuda" or not is_suitable(model):
            return None
        return cls(model) if _kernels_run(model.get_device()) else None

    def step(self, cache: RowCache, rows: int, ids: Sequence[int] | Tensor) -> Tensor:
        """Add one token to each of the first rows of a cache; logits (rows, V) fp32 after it. Does not wait."""
        padded, longest = bucket(rows), max(cache.positions[:rows]) + 1
        span = max(64, 1 << (longest - 1).bit_length())  # a bound of the positions, which the graph relies on
        if cache.pool.generation != self._generation:  # its tensors are others than those of the graphs
            self._forget_graphs()
            self._generation = cache.pool.generation
        with self._on_device:
            self._load(cache, rows, ids, padded)
            if (padded, span) in self._graphs:
                graph, logits = self._graphs[padded, span]
                graph.replay()
            else:
                logits = self._forward(cache, padded, span)
                if self._use_graphs:
                    self._record(cache, padded, span)
        cache.positions[:rows] = [position + 1 for position in cache.positions[:rows]]
        return logits[:rows].clone()

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
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        self._graphs.clear()
        if self._use_graphs:  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()

    def _record(self, cache: RowCache, padded: int, span: int) -> None:
        """Record a step as a graph. Nothing runs; the step before has compiled and warmed up everything."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                logits = self._forward(cache, padded, span)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._graphs[padded, span] = graph, logits

    # --- the network ---------------------------------------------------------------------------------

    def _forward(self, cache: RowCache, rows: int, span: int) -> Tensor:
        """logits (rows, V) after one more token of each row, the padding among them; no position reaches span."""
        model, config = self._model, self._model.config
        ids, positions = self._ids[:rows], self._positions[:rows]
        x = F.rms_norm(model.wte.weight[ids].to(model.compute_dtype), (config.n_embd,), eps=NORM_EPS)
        if cache.previous is not None:
            previous = cache.previous[:rows]
            gate = torch.sigmoid(model.smear_gate(x[:, :SMEAR_CHANNELS])) * model.smear_lambda.to(x.dtype)
            smeared = x + gate * previous[:, 0]
            previous.copy_(torch.where(self._real[:rows], x[:, None], previous))
            x = smeared
        x0 = middle = x
        for layer, block in enumerate(model.blocks):
            if config.use_lambdas:
                mixed = torch.empty_like(x)
                factors = model.resid_lambdas[layer:], model.x0_lambdas[layer:]
                self._kernels.mix[(-(-x.numel() // 1024),)](x, x0, *factors, mixed, x.numel(), BLOCK=1024)
                x = mixed
            x = self._attention(cache, layer, block.attn, x, ids, positions, span)
            hidden = self._linear(x, [block.mlp.c_fc], norm=True, square=True)
            x = self._linear(hidden, [block.mlp.c_proj], residual=x)
            middle = x if layer == config.n_layer // 2 else middle
        if config.use_backout:
            x = x - model.backout_lambda.to(x.dtype) * middle
        return self._linear(x, [model.lm_head], norm=True, softcap=config.logit_softcap)

    def _attention(
        self,
        cache: RowCache,
        layer: int,
        attn: Attention,
        x: Tensor,
        ids: Tensor,
        positions: Tensor,
        span: int,
    ) -> Tensor:
        model, config = self._model, self._model.config
        rows, heads, kv_heads, dim = len(x), config.n_head, config.n_kv_head, config.head_dim
        gated = config.has_value_embed(layer)
        x_in = F.rms_norm(x, (config.n_embd,), eps=NORM_EPS) if gated else x  # which the gate reads, too
        qkv = self._linear(x_in, [attn.c_q, attn.c_k, attn.c_v], norm=not gated)
        q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
        keys, values = cache.pool.keys[layer], cache.pool.values[layer]
        pages = self._tables[cache.pool.group_of[layer]]
        slots = pages.size(1) * PAGE
        block = 16 if rows == 1 else 32  # keys at a time
        parts = 1 + min(max(_PROGRAMS // (rows * heads), 1), -(-min(span, slots) // block), _MAX_PARTS - 1)
        sums = x.new_empty(rows * heads * parts, dtype=torch.float32)
        partial = x.new_empty(rows * heads * parts * dim, dtype=torch.float32)
        table, gate = x, x
        if gated:
            table, gate = model.value_embeds[str(layer)].get_parameter("weight"), attn.ve_gate.weight
        self._kernels.attend[rows, heads, parts](
            q, k, v, keys, values, pages, positions, model.cos, model.sin, ids, table, x_in, gate, sums, partial,
            qkv.stride(0), pages.stride(0), keys.stride(1), slots, attn.window, table.stride(0), x_in.stride(0),
            NORM_EPS, config.qk_scale, config.ve_gate_scale, _largest_score(config), GROUP=heads // kv_heads, DIM=dim,
            GATE=config.ve_gate_channels if gated else 0, PAGE=PAGE, BLOCK=block, num_warps=4,
        )  # fmt: skip
        y = torch.empty_like(x)
        self._kernels.combine[(rows * heads,)](sums, partial, y, parts, DIM=dim, MAX_PARTS=_MAX_PARTS)
        return self._linear(y, [attn.c_proj], residual=x)

    def _linear(
        self,
        x: Tensor,
        layers: list[Linear | QuantizedLinear],
        *,
        norm: bool = False,
        square: bool = False,
        residual: Tensor | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        """x (rows, K), normalised or not, through layers side by side; then squared, added to, or capped."""
        if len(x) == 1:
            return self._row(x, layers, norm, square, residual, softcap)
        if norm:
            x = F.rms_norm(x, (x.size(1),), eps=NORM_EPS)
        if type(layers[0]) is QuantizedLinear and len(x) <= _MOST_ROWS:
            return self._rows(x, layers, square, residual, softcap)
        if softcap:
            return self._model.logits(x)
        if len(layers) > 1:
            return self._side_by_side(x, layers)
        if residual is not None and type(layers[0]) is Linear:
            return torch.addmm(residual, x, layers[0].weight.to(x.dtype).t())
        y = layers[0](x)
        if square:
            y = F.relu(y).square_()
        return y if residual is None else residual + y

    def _side_by_side(self, x: Tensor, layers: list[Linear | QuantizedLinear]) -> Tensor:
        out = x.new_empty(len(x), sum(layer.weight.size(0) for layer in layers))
        for layer, part in zip(
            layers, out.split([layer.weight.size(0) for layer in layers], dim=1), strict=True
        ):
            if type(layer) is Linear:
                torch.mm(x, layer.weight.to(x.dtype).t(), out=part)
            else:
                part.copy_(layer(x))
        return out

    def _row(
        self, x: Tensor, layers: list[Linear | QuantizedLinear], norm: bool, square: bool,
        residual: Tensor | None, softcap: float,
    ) -> Tensor:  # fmt: skip
        out, weights, scales, sizes = self._operands(x, layers, softcap)
        block_n, block_k = 1 if sum(sizes) < 2560 else 2, 1 << (x.size(1) - 1).bit_length()
        self._kernels.matrix_row[(-(-sum(sizes) // block_n),)](
            x, *weights, *scales, x if residual is None else residual, out, *(sizes * 2)[:2], sum(sizes), NORM_EPS,
            softcap or 1.0, K=x.size(1), PARTS=len(layers), NORM=norm, SQUARE=square,
            RESIDUAL=residual is not None, SCALED=isinstance(layers[0], QuantizedLinear), SOFTCAP=softcap > 0,
            BLOCK_N=block_n, BLOCK_K=block_k, num_warps=min(max(block_n * block_k // 2048, 1), 8),
        )  # fmt: skip
        return out

    def _rows(
        self, x: Tensor, layers: list[Linear | QuantizedLinear], square: bool, residual: Tensor | None,
        softcap: float,
    ) -> Tensor:  # fmt: skip
        out, weights, scales, sizes = self._operands(x, layers, softcap)
        blocks, parts, tile = _tiles(len(x), sizes, x.size(1), x.element_size())
        sums = blocks * parts * tile["BLOCK_N"] * tile["BLOCK_M"] if parts > 1 else 0
        partial = x.new_empty(sums, dtype=torch.float32)
        self._kernels.matrix_rows[blocks, parts](
            x, *weights, *scales, x if residual is None else residual, out, partial, self._arrived, len(x),
            *(*sizes, 0, 0)[:3], softcap or 1.0, K=x.size(1), LAYERS=len(layers), SQUARE=square,
            RESIDUAL=residual is not None, SOFTCAP=softcap > 0, PARTS=parts, **tile,
        )  # fmt: skip
        return out

    def _operands(
        self, x: Tensor, layers: list[Linear | QuantizedLinear], softcap: float
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[int]]:
        """(out, weights, scales, outputs of each layer) for a kernel of three layers; one is given thrice."""
        three = layers * (3 // len(layers))
        weights, scales = [layer.weight for layer in three], [getattr(layer, "scale", x) for layer in three]
        sizes = [layer.weight.size(0) for layer in layers]
        if softcap:  # the head, whose padding is left out
            sizes = [self._model.config.vocab_size]
        out = x.new_empty(len(x), sum(sizes), dtype=torch.float32 if softcap else x.dtype)
        return out, weights, scales, sizes


def _tiles(rows: int, sizes: list[int], inputs: int, itemsize: int) -> tuple[int, int, dict[str, int]]:
    """(blocks of outputs, parts of K, block sizes) of matrix_rows for activations of `itemsize` bytes.

    Reasoned for H100 and H200, not timed. What is under way must cover latency times bandwidth: 0.7 us times
    3.4 to 4.8 TB/s, 18 to 25 kB for each of 132 multiprocessors. A tile of 64 outputs and 128 inputs is 8 kB,
    and of the four stages of a program three are under way: one program for each multiprocessor is just enough,
    two are safe. 64 outputs are 16 for each of four warps, the least that a tensor core takes; each block reads
    the activations once more, from the L2 cache. A part leaves 4 bytes for each row and output, so it must read
    four times as many.
    """
    block_m, block_n, block_k = max(1 << (rows - 1).bit_length(), 16), 64, 256 // itemsize
    blocks, steps = sum(-(-size // block_n) for size in sizes), -(-inputs // block_k)
    parts = max(min(_ENOUGH // blocks, inputs // (16 * block_m)), 1)
    parts = -(-steps // -(-steps // parts))  # none without a tile
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 4}
    return blocks, parts, tile


def _largest_score(config: GPTConfig) -> float:
    """Bound of a score in units of log2(e): queries and keys have the root mean square qk_scale."""
    return config.head_dim**0.5 * config.qk_scale**2 * _LOG2_E


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


def _kernels() -> Any:
    from nanochat import cuda_kernels  # which imports Triton

    return cuda_kernels


@functools.cache
def _kernels_run(device: torch.device) -> bool:
    """Whether Triton can compile for the device, which also needs a C compiler; tried once."""
    try:
        with torch.cuda.device(device):
            x = torch.ones(8, device=device)
            _kernels().mix[(1,)](x, x, x, x, x, 8, BLOCK=1024)
            return bool((x == 2).all())
    except Exception as error:  # compilers fail in ways of their own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        logging.getLogger(__name__).warning("decoding without CUDA graphs: %s", lines[0][:200])
        return False
