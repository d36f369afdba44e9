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
    """Whether the kernel takes heads like those of q (B, T, H, D)."""
    return q.size(-1) % _LANES == 0


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel, after telling torch of it. Raises RuntimeError where there is none."""
    found = load_library("cpu_attention")
    if found is None:
        raise RuntimeError("no C++ compiler, or NANOCHAT_KERNELS=off")
    # Operators of torch rather than an autograd.Function, so that compiled steps can call them without breaking up; and
    # not custom_op, whose first call imports torch's compiler: seconds at every start.
    lib = torch.library
    lib.define(_FORWARD, "(Tensor q, Tensor k, Tensor v, int window) -> (Tensor, Tensor)")
    lib.define(
        _BACKWARD,
        "(Tensor q, Tensor k, Tensor v, Tensor y, Tensor sums, Tensor grad, int window) -> (Tensor, Tensor, Tensor)",
    )
    for name, run, shapes in (
        (_FORWARD, _forward, _forward_shapes),
        (_BACKWARD, _backward, _backward_shapes),
    ):
        lib.impl(name, "CPU")(run)
        lib.register_fake(name)(shapes)
    lib.register_autograd(_FORWARD, _gradient, setup_context=_remember)
    return found


def attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """(q (B, T, H, D), k, v (B, T, Hkv, D), window) -> as q. All fp32; a window below 0 is unlimited."""
    y, _ = torch.ops.nanochat.cpu_attention(q.contiguous(), k.contiguous(), v.contiguous(), window)
    return y


_FORWARD, _BACKWARD = "nanochat::cpu_attention", "nanochat::cpu_attention_backward"


def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.size(0), q.size(2), q.size(1))


def _forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    y, sums = _forward_shapes(q, k, v, window)
    _call(library().attention_forward, _sizes(q, k, window), q, k, v, y, sums)
    return y, sums


def _backward_shapes(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _backward(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, grad: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _backward_shapes(q, k, v)
    _call(library().attention_backward, _sizes(q, k, window), q, k, v, y, sums, grad, *grads)
    return grads


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    backward = torch.ops.nanochat.cpu_attention_backward
    return *backward(*ctx.saved_tensors, grad.contiguous(), ctx.window), None


def _call(function: Any, sizes: _Sizes, *tensors: Tensor) -> None:
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        raise TypeError("only fp32 on processors")
    pointers = [c_void_p(tensor.data_ptr()) for tensor in tensors]
    function(ctypes.byref(sizes), *pointers, torch.get_num_threads())


def _sizes(q: Tensor, k: Tensor, window: int) -> _Sizes:
    return _Sizes(*q.shape[:3], k.size(2), q.size(3), window)
