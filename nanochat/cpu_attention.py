"""Attention of whole sequences on processors, compiled: what cpu_attention.cpp needs to know, and its gradient.

The kernel is an operator of torch, so that eager and compiled training use the same one.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from nanochat.native import load_library

_LANES = 8


class _Sizes(ctypes.Structure):
    _fields_ = tuple(
        (name, c_int64) for name in ("rows", "length", "heads", "kv_heads", "head_size", "window")
    )


def fits(q: Tensor) -> bool:
    """Whether heads like those of q (B, T, H, D) are whole vectors."""
    return q.size(-1) % _LANES == 0


@functools.cache
def operator() -> Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """The operator (q (B, T, H, D), k, v (B, T, Hkv, D), window) -> (y as q, logarithms of sums (B, H, T)).

    All tensors fp32; a window below 0 is unlimited. Raises RuntimeError where there is no library.
    """
    library = load_library("cpu_attention")
    if library is None:
        raise RuntimeError("no C++ compiler, or NANOCHAT_KERNELS=off")

    def call(function: Any, sizes: _Sizes, *tensors: Tensor) -> None:
        if any(tensor.dtype != torch.float32 for tensor in tensors):
            raise TypeError("only fp32")
        pointers = [c_void_p(tensor.data_ptr()) for tensor in tensors]
        function(ctypes.byref(sizes), *pointers, torch.get_num_threads())

    def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        y, sums = _like(q)
        call(library.attention_forward, _sizes(q, k, window), q, k, v, y, sums)
        return y, sums

    def gradients(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, window: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v = (x.contiguous() for x in (grad, q, k, v))
        grads = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        call(library.attention_backward, _sizes(q, k, window), q, k, v, y, sums, grad, *grads)
        return grads

    attend_op = torch.library.custom_op(
        "nanochat::cpu_attention", attend, mutates_args=(), device_types="cpu",
        schema="(Tensor q, Tensor k, Tensor v, int window) -> (Tensor, Tensor)",
    )  # fmt: skip
    gradients_op = torch.library.custom_op(
        "nanochat::cpu_attention_gradients", gradients, mutates_args=(), device_types="cpu",
        schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor y, Tensor sums, int window)"
        " -> (Tensor, Tensor, Tensor)",
    )  # fmt: skip
    attend_op.register_fake(lambda q, k, v, window: _like(q))
    gradients_op.register_fake(
        lambda grad, q, k, v, y, sums, window: tuple(x.new_empty(x.shape) for x in (q, k, v))
    )

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.window = inputs
        ctx.save_for_backward(*tensors, *output)

    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *gradients_op(grad, *ctx.saved_tensors, ctx.window), None

    attend_op.register_autograd(backward, setup_context=keep)
    return attend_op


def _like(q: Tensor) -> tuple[Tensor, Tensor]:
    rows, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(rows, heads, length)


def _sizes(q: Tensor, k: Tensor, window: int) -> _Sizes:
    return _Sizes(*q.shape[:3], k.size(2), q.size(3), window)
