"""The network's blocks by the kernels of cuda_kernels.py, with attention left to the caller: for decode steps and for prompts.

Weights are used where they lie, so that training in place is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.cuda_graphs import kernels_overlap, overlapping
from nanochat.gpt import GPT, NORM_EPS, SMEAR_CHANNELS, Linear
from nanochat.quantize import QuantizedLinear

LOG2_E = 1.4426950408889634
_MOST_ROWS = 64  # that quantised matrices are multiplied with as they lie; beyond, they are widened first
_ENOUGH = 264  # programs of such a product, two for each multiprocessor of an H100; below, K is split

Layer = Linear | QuantizedLinear
Attend = Callable[[int, Tensor, Tensor], Tensor]


class CudaNetwork:
    """A network whose attention somebody else computes. `arrived` holds zeros between kernels, see matrix_rows and attend."""

    def __init__(self, model: GPT) -> None:
        from nanochat import cuda_kernels  # which imports Triton

        self.model = model
        self.kernels: Any = cuda_kernels
        device = model.get_device()
        self.overlaps = kernels_overlap(device)
        self.arrived = torch.zeros(_ENOUGH, dtype=torch.int32, device=device)

    def reserve(self, count: int) -> None:
        """Have so many counters of what has arrived."""
        if count > len(self.arrived):
            self.arrived = self.arrived.new_zeros(count)

    def overlap(self, rows: int) -> dict[str, bool]:
        """Options of a kernel of so many rows. Kernels of one row are so short that starting them is half of their time."""
        return overlapping(self.overlaps and rows == 1)

    def blocks(self, x: Tensor, attend: Attend, last: Tensor | None = None) -> Tensor:
        """logits (rows, V) after the blocks, of all tokens x (rows, C) or of those at `last`.

        attend: attention's output (rows, C) of a layer, given queries, keys and values side by side, and what they are made of.
        """
        model, config = self.model, self.model.config
        x0 = middle = x
        for layer, block in enumerate(model.blocks):
            if config.use_lambdas:
                mixed = torch.empty_like(x)
                factors = model.resid_lambdas[layer:], model.x0_lambdas[layer:]
                self.kernels.mix[(-(-x.numel() // 1024),)](
                    x, x0, *factors, mixed, x.numel(), BLOCK=1024, **self.overlap(len(x))
                )
                x = mixed
            attn, mlp = block.attn, block.mlp
            gated = config.has_value_embed(layer)
            x_in = F.rms_norm(x, (config.n_embd,), eps=NORM_EPS) if gated else x  # which the gate reads, too
            qkv = self.linear(x_in, [attn.c_q, attn.c_k, attn.c_v], norm=not gated)
            x = self.linear(attend(layer, qkv, x_in), [attn.c_proj], residual=x)
            hidden = self.linear(x, [mlp.c_fc], norm=True, square=True)
            x = self.linear(hidden, [mlp.c_proj], residual=x)
            if config.use_backout and layer == config.n_layer // 2:
                middle = x.clone()  # or the next layer might add to it
        if config.use_backout:
            x = x - model.backout_lambda.to(x.dtype) * middle
        x = x if last is None else x[last]
        return self.linear(x, [model.lm_head], norm=True, softcap=config.logit_softcap)

    def smeared(self, x: Tensor, previous: Tensor) -> Tensor:
        """Embeddings (rows, C) and a gated part of those of the tokens before, `previous` (rows, C)."""
        model = self.model
        gate = torch.sigmoid(model.smear_gate(x[:, :SMEAR_CHANNELS])) * model.smear_lambda.to(x.dtype)
        return x + gate * previous

    def gate(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(value embeddings, what the gate reads, its weights) for kernels; anything where a layer has none."""
        if not self.model.config.has_value_embed(layer):
            return x, x, x
        table = self.model.value_embeds[str(layer)].get_parameter("weight")
        return table, x, self.model.blocks[layer].attn.ve_gate.weight

    def gate_channels(self, layer: int) -> int:
        """How many numbers a layer's gate reads; 0: it has none."""
        config = self.model.config
        return config.ve_gate_channels if config.has_value_embed(layer) else 0

    # --- products ------------------------------------------------------------------------------------

    def linear(
        self,
        x: Tensor,
        layers: list[Layer],
        *,
        norm: bool = False,
        square: bool = False,
        residual: Tensor | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        """x (rows, K), normalised or not, through layers side by side; then squared, added to, or capped.

        The residual may be overwritten.
        """
        if len(x) == 1:
            return self._row(x, layers, norm, square, residual, softcap)
        if norm:
            x = F.rms_norm(x, (x.size(1),), eps=NORM_EPS)
        if type(layers[0]) is QuantizedLinear and len(x) <= _MOST_ROWS:
            return self._rows(x, layers, square, residual, softcap)
        if softcap:
            return self.model.logits(x)
        if len(layers) > 1:
            return self._side_by_side(x, layers)
        if residual is not None and type(layers[0]) is Linear:
            return residual.addmm_(x, layers[0].weight.to(x.dtype).t())
        y = layers[0](x)
        if square:
            self.kernels.square[(-(-y.numel() // 4096),)](y, y.numel(), BLOCK=4096)
        return y if residual is None else residual + y

    def _side_by_side(self, x: Tensor, layers: list[Layer]) -> Tensor:
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
        self, x: Tensor, layers: list[Layer], norm: bool, square: bool, residual: Tensor | None, softcap: float,
    ) -> Tensor:  # fmt: skip
        out, weights, scales, sizes = self._operands(x, layers, softcap)
        is_scaled = isinstance(layers[0], QuantizedLinear)
        block_n, block_k, warps = _row_tile(sum(sizes), x.size(1), weights[0].dtype, self.overlaps)
        programs = -(-sum(sizes) // block_n)
        self.kernels.matrix_row[(programs,)](
            x, *weights, *scales, x if residual is None else residual, out, *(sizes * 2)[:2], sum(sizes),
            NORM_EPS, softcap or 1.0, K=x.size(1), PARTS=len(layers), NORM=norm, SQUARE=square,
            RESIDUAL=residual is not None, SCALED=is_scaled, SOFTCAP=softcap > 0,
            BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, **self.overlap(1),
        )  # fmt: skip
        return out

    def _rows(
        self, x: Tensor, layers: list[Layer], square: bool, residual: Tensor | None,
        softcap: float,
    ) -> Tensor:  # fmt: skip
        out, weights, scales, sizes = self._operands(x, layers, softcap)
        blocks, parts, tile = _tiles(len(x), sizes, x.size(1), x.element_size())
        sums = blocks * parts * tile["BLOCK_N"] * tile["BLOCK_M"] if parts > 1 else 0
        partial = x.new_empty(sums, dtype=torch.float32)
        self.kernels.matrix_rows[blocks, parts](
            x, *weights, *scales, x if residual is None else residual, out, partial, self.arrived, len(x),
            *(*sizes, 0, 0)[:3], softcap or 1.0, K=x.size(1), LAYERS=len(layers), SQUARE=square,
            RESIDUAL=residual is not None, SOFTCAP=softcap > 0, PARTS=parts, **tile,
        )  # fmt: skip
        return out

    def _operands(
        self, x: Tensor, layers: list[Layer], softcap: float
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[int]]:
        """(out, weights, scales, outputs of each layer) for a kernel of three layers; one is given thrice."""
        three = layers * (3 // len(layers))
        weights, scales = [layer.weight for layer in three], [getattr(layer, "scale", x) for layer in three]
        sizes = [layer.weight.size(0) for layer in layers]
        if softcap:  # the head, whose padding is left out
            sizes = [self.model.config.vocab_size]
        out = x.new_empty(len(x), sum(sizes), dtype=torch.float32 if softcap else x.dtype)
        return out, weights, scales, sizes


def _row_tile(outputs: int, inputs: int, dtype: torch.dtype, overlaps: bool) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_K, warps) of matrix_row for weights of a type, the fastest of some on an H200 with the matrices of a d20.

    Short rows are a warp's, piece by piece, so that no warp waits for another; long ones are read at once by some.
    Where kernels overlap, a program has some outputs, if its registers hold them: x, which all wait for, is read by fewer.
    """
    is_short = inputs <= 2048
    if overlaps:
        if is_short:
            tile = {torch.int8: (2, 256, 1), torch.float8_e4m3fn: (4, 512, 1)}.get(dtype, (4, 256, 1))
        else:
            tile = (4 if dtype.itemsize == 1 else 2, 512, 2)
        block_n, block_k, warps = tile
        fits = block_n * inputs * dtype.itemsize <= warps * 20480  # 160 registers a thread
        return (block_n if fits else block_n // 2), block_k, warps
    if is_short:
        return (4, 256, 4) if dtype.itemsize == 1 else (1, 256, 1)
    block_n, block_k = 1 if outputs < 2560 else 2, 1 << (inputs - 1).bit_length()
    return block_n, block_k, min(block_n * block_k // 2048, 8)


def _tiles(rows: int, sizes: list[int], inputs: int, itemsize: int) -> tuple[int, int, dict[str, int]]:
    """(blocks of outputs, parts of K, block sizes) of matrix_rows for activations of `itemsize` bytes.

    Reasoned for H100 and H200. On an H200 a product of d20 takes 5 to 8.5 us with 8 rows and 9 to 13 with 64, like
    bf16's with what is fused, so at best the memory is halved; other tiles were not tried (LOG 2026-11-27).

    What is under way must cover latency times bandwidth: 0.7 us times 3.4 to 4.8 TB/s, 18 to 25 kB for each of 132
    multiprocessors. A tile of 64 outputs and 128 inputs is 8 kB,
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
