"""Attention of whole sequences on processors, compiled: what cpu_attention.cpp needs to know, and its gradient."""

from __future__ import annotations

import ctypes
import functools
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
def library() -> ctypes.CDLL:
    """The compiled kernel. Raises RuntimeError where there is none."""
    found = load_library("cpu_attention")
    if found is None:
        raise RuntimeError("no C++ compiler, or NANOCHAT_KERNELS=off")
    return found


class CpuAttention(torch.autograd.Function):
    """(q (B, T, H, D), k, v (B, T, Hkv, D), window) -> as q. All fp32; a window below 0 is unlimited."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        y, sums = torch.empty_like(q), q.new_empty(q.size(0), q.size(2), q.size(1))
        _call(library().attention_forward, _sizes(q, k, window), q, k, v, y, sums)
        ctx.save_for_backward(q, k, v, y, sums)
        ctx.window = window
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, sums = ctx.saved_tensors
        grads = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        sizes, (grad,) = _sizes(q, k, ctx.window), gradients
        _call(library().attention_backward, sizes, q, k, v, y, sums, grad.contiguous(), *grads)
        return *grads, None


def _call(function: Any, sizes: _Sizes, *tensors: Tensor) -> None:
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        raise TypeError("only fp32 on processors")
    pointers = [c_void_p(tensor.data_ptr()) for tensor in tensors]
    function(ctypes.byref(sizes), *pointers, torch.get_num_threads())


def _sizes(q: Tensor, k: Tensor, window: int) -> _Sizes:
    return _Sizes(*q.shape[:3], k.size(2), q.size(3), window)
