"""The compiled step of processors: what cpu_decode.cpp needs to know about a model and a cache.

It takes the place of the network's forward pass where every running row gets one token, and where small networks read
prompts. Weights are used where they lie, so that training in place is seen; nothing is copied but the rotary tables.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import nn

from nanochat.gpt import GPT
from nanochat.native import load_library
from nanochat.quantize import weight_layers

if TYPE_CHECKING:
    from nanochat.row_cache import RowCache

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_LANES = 8
_THREADS_VARY = {"OMP_THREAD_LIMIT", "OMP_DYNAMIC"}  # the step needs as many threads as it asks for


class _Matrix(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("scale", c_void_p), ("type", c_int32), ("inputs", c_int32), ("outputs", c_int32))  # fmt: skip


_MATRICES = ("q", "k", "v", "o", "fc", "proj", "value_table", "value_gate")


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in _MATRICES), ("window", c_int32), ("ring", c_int32), ("keys", c_void_p),
        ("values", c_void_p), ("pages", c_void_p),
    )  # fmt: skip


class _Network(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("num_layers", "width", "heads", "kv_heads", "head_size", "hidden", "vocab", "cache_type")),
        *((name, c_float) for name in ("qk_scale", "gate_scale", "softcap")), ("gate_channels", c_int32),
        *((name, _Matrix) for name in ("table", "head", "smear_gate")),
        *((name, c_void_p) for name in ("cos", "sin", "resid", "skip", "smear", "backout", "previous", "layers")),
    )  # fmt: skip


class _Tokens(ctypes.Structure):
    _fields_ = (
        ("count", c_int32), ("rows", c_int32), ("ids", c_void_p), ("owners", c_void_p), ("positions", c_void_p),
    )  # fmt: skip


# Tokens at once times width squared up to which prompts are read here, and their last position. Beyond, PyTorch's products
# of many rows and attention in blocks gain more than calling its operations costs (LOG 2026-11-26); in bf16, which
# it multiplies faster than fp32 where the processor can, earlier.
_READ_WORK = {torch.float32: 1 << 24, torch.bfloat16: 1 << 22}
_READ_CONTEXT = 512


class CpuDecoder:
    """One network, ready for compiled steps."""

    def __init__(self, model: GPT, library: ctypes.CDLL) -> None:
        config = model.config
        self._library, self._model = library, model
        library.decode_scratch.restype = c_int64
        self._cos, self._sin = (table.float().contiguous() for table in (model.cos, model.sin))
        self._layers = (_Layer * config.n_layer)()
        for number, (layer, block) in enumerate(zip(self._layers, model.blocks, strict=True)):
            attn, mlp = block.attn, block.mlp
            modules = [attn.c_q, attn.c_k, attn.c_v, attn.c_proj, mlp.c_fc, mlp.c_proj]
            if config.has_value_embed(number):
                modules += [model.value_embeds[str(number)], attn.ve_gate]
            for name, module in zip(_MATRICES, modules, strict=False):
                setattr(layer, name, _matrix(module))
            layer.window = config.window_sizes[number]
        head = _matrix(model.lm_head)
        head.outputs = config.vocab_size  # not the padding
        pointers = {"cos": self._cos, "sin": self._sin}
        if config.use_lambdas:
            pointers |= {"resid": model.resid_lambdas, "skip": model.x0_lambdas}
        if config.use_smear:
            pointers["smear"] = model.smear_lambda
        if config.use_backout:
            pointers["backout"] = model.backout_lambda
        self._network = _Network(
            num_layers=config.n_layer, width=config.n_embd, heads=config.n_head, kv_heads=config.n_kv_head,
            head_size=config.head_dim, hidden=model.blocks[0].mlp.c_fc.out_features, vocab=config.vocab_size,
            cache_type=_TYPES[model.compute_dtype], qk_scale=config.qk_scale, gate_scale=config.ve_gate_scale,
            softcap=config.logit_softcap, gate_channels=config.ve_gate_channels, table=_matrix(model.wte), head=head,
            layers=ctypes.addressof(self._layers), **{name: t.data_ptr() for name, t in pointers.items()},
        )  # fmt: skip
        if config.use_smear:
            self._network.smear_gate = _matrix(model.smear_gate)
        self._scratch = torch.empty(0, dtype=torch.float32)
        self._most_tokens = _READ_WORK[model.compute_dtype] // config.n_embd**2

    @classmethod
    def of(cls, model: object) -> CpuDecoder | None:
        """A decoder, or None where the model, its device or this machine is none that it can serve."""
        if not isinstance(model, GPT) or not _is_suitable(model) or _THREADS_VARY & os.environ.keys():
            return None
        library = load_library("cpu_decode")
        return None if library is None else cls(model, library)

    def step(self, cache: RowCache, rows: int, ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Add one token to each of the first rows of a cache; logits (rows, V) fp32 after it."""
        return self.read(cache, 0, [[int(token)] for token in ids[:rows]])

    def reads(self, positions: Sequence[int], counts: Sequence[int]) -> bool:
        """Whether reading so many tokens at these positions of some rows is worth it here."""
        ends = (position + count for position, count in zip(positions, counts, strict=False))
        return sum(counts) <= self._most_tokens and max(ends) <= _READ_CONTEXT

    def read(self, cache: RowCache, first: int, spans: Sequence[Sequence[int]]) -> torch.Tensor:
        """Add some tokens, at least one, to each of the rows from `first` on; logits (rows, V) fp32 after the last."""
        network, count = self._network, sum(map(len, spans))
        pool = cache.pool
        for layer, keys, values, group in zip(
            self._layers, pool.keys, pool.values, pool.group_of, strict=True
        ):
            table = cache.tables[group]
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
            layer.pages, layer.ring = table.ctypes.data, table.shape[1]
        if cache.previous is not None:
            network.previous = cache.previous.data_ptr()
        ids, owners, positions = (c_int64 * count)(), (c_int32 * count)(), (c_int32 * count)()
        at, longest, threads = 0, 0, torch.get_num_threads()
        for row, span in enumerate(spans, first):
            start, end = cache.positions[row], at + len(span)
            ids[at:end], owners[at:end] = span, [row] * len(span)
            positions[at:end] = range(start, start + len(span))
            cache.positions[row] = start + len(span)
            at, longest = end, max(longest, start + len(span))
        needed = self._library.decode_scratch(ctypes.byref(network), count, longest, threads)
        if needed > self._scratch.nbytes:
            self._scratch = torch.empty(needed // 2, dtype=torch.float32)  # twice as much as is needed
        tokens = _Tokens(count, len(spans), *map(ctypes.addressof, (ids, owners, positions)))
        logits = torch.empty(len(spans), network.vocab)
        self._library.decode(
            ctypes.byref(network), ctypes.byref(tokens), c_void_p(logits.data_ptr()),
            c_void_p(self._scratch.data_ptr()), longest, threads,
        )  # fmt: skip
        return logits


def _matrix(module: nn.Module) -> _Matrix:
    weight, scale = module.weight, getattr(module, "scale", None)
    assert isinstance(weight, torch.Tensor) and weight.is_contiguous()
    pointer = scale.data_ptr() if isinstance(scale, torch.Tensor) else None
    return _Matrix(weight.data_ptr(), pointer, _TYPES[weight.dtype], weight.size(1), weight.size(0))


def _is_suitable(model: GPT) -> bool:
    """Whether all sizes are whole vectors and every module is one that the C++ knows."""
    if any(scalar.dtype != torch.float32 for scalar in model.parameters(recurse=False)):
        return False
    if model.get_device().type != "cpu" or model.compute_dtype not in (torch.float32, torch.bfloat16):
        return False
    sizes = model.config.head_dim, model.config.vocab_size
    layers = weight_layers(model)
    if any(size % _LANES for size in sizes) or layers is None:
        return False
    weights = [weight for module in layers if isinstance(weight := module.weight, torch.Tensor)]
    return all(weight.dtype in _TYPES and weight.is_contiguous() for weight in weights)
