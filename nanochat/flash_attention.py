"""Causal attention with a sliding window, for training and for decoding with a cache.

Every backend gets (B, T, H, D) tensors. A window w lets a position see itself and the w before it;
w < 0 is unlimited. The first that runs when tried once is used (NANOCHAT_ATTN names another): on GPUs of Flash
Attention 3, Flash Attention 2, flex and torch's own kernels; on processors of ours in C++ and torch's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.common import UserError
from nanochat.memory import CPU_MATERIALISE_UP_TO

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Attention of a whole sequence to itself. q (B, T, H, D), k and v (B, T, Hkv, D) -> (B, T, H, D)."""
    _, attend = backend(q.device, q.dtype)
    return attend(q, k, v, window)


def _torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    length = q.size(1)
    if q.device.type == "cpu" and length <= CPU_MATERIALISE_UP_TO:
        return _written_out(q, k, v, window)
    if 0 <= window < length - 1:
        return _sdpa(q, k, v, mask=_visible(length, window, q.device))
    return _sdpa(q, k, v, is_causal=True)


def cached_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of new queries (B, Tq, H, D) to cached keys and values (B, Tk, Hkv, D).

    mask: (B or 1, 1, Tq, Tk) booleans, True where a key is visible; None if all are.
    """
    return _sdpa(q, k, v, mask=mask)


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)
    return y.transpose(1, 2)


def _visible(length: int, window: int, device: torch.device) -> torch.Tensor:
    """(T, T) booleans: key not after the query, and at most `window` before it."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    visible = distance >= 0
    return visible & (distance <= window) if window >= 0 else visible


# --- processors --------------------------------------------------------------------------------------


def _load_cpp() -> Attend:
    from nanochat.cpu_attention import attention, fits, library

    library()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        return attention(q, k, v, window) if fits(q) else _torch_attention(q, k, v, window)

    return attend


class _Softmax(torch.autograd.Function):
    """softmax(q k^T + mask) v, keeping the probabilities for the backward pass. All (B, H, T, D)."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        probabilities = torch.softmax((q @ k.mT).add_(mask), dim=-1)
        ctx.save_for_backward(q, k, v, probabilities)
        return probabilities @ v

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, probabilities = ctx.saved_tensors
        (grad,) = gradients
        backward = torch.ops.aten._softmax_backward_data
        grad_scores = backward(grad @ v.mT, probabilities, -1, probabilities.dtype)
        return grad_scores @ k, grad_scores.mT @ q, probabilities.mT @ grad, None


def _written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    group = q.size(2) // k.size(2)
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    hidden = ~_visible(q.size(2), window, q.device)
    mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
    y = _Softmax.apply(q * q.size(-1) ** -0.5, k, v, mask)
    assert isinstance(y, torch.Tensor)
    return y.transpose(1, 2)


# --- other kernels -----------------------------------------------------------------------------------


def _load_fa3() -> Attend:
    import flash_attn_interface  # pyright: ignore[reportMissingImports]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        y = flash_attn_interface.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
        return y[0] if isinstance(y, tuple) else y  # early releases also return the sums

    return attend


def _load_fa2() -> Attend:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        return flash_attn_func(q, k, v, causal=True, window_size=(window, 0))

    return attend


def _load_flex() -> Attend:
    """flex makes a kernel that skips what a window hides, where torch's own would compute all and mask it.

    It compiles for each shape, so only training's rows go through it, and of many shapes the first ones; full attention
    stays with torch's kernel.
    """
    compiled = torch.compile(flex_attention, dynamic=False)
    shapes = set()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        length = q.size(1)
        if not 0 <= window < length - 1 or length % _FLEX_BLOCK or not torch.is_grad_enabled():
            return _torch_attention(q, k, v, window)
        if torch.compiler.is_compiling():
            return flex_attention(q, k, v, window)
        shape = q.shape, k.shape, window
        if shape not in shapes and len(shapes) == _FLEX_SHAPES:
            return _torch_attention(q, k, v, window)
        shapes.add(shape)
        return compiled(q, k, v, window)

    return attend


_FLEX_BLOCK = 128
_FLEX_SHAPES = 8  # beyond, torch.compile would give up and hold all scores


def flex_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """causal_attention by torch's flex attention. Uncompiled it is correct, but holds all scores."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    def visible(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (query - key <= window) if window >= 0 else key <= query

    length = q.size(1)
    mask = create_block_mask(visible, None, None, length, length, device=str(q.device))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = flex(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))
    assert isinstance(y, torch.Tensor)
    return y.transpose(1, 2)


# --- choosing the backend ----------------------------------------------------------------------------

_LOADERS: dict[str, tuple[str, Callable[[], Attend]]] = {
    "cpp": ("our C++ kernel", _load_cpp),
    "fa3": ("Flash Attention 3", _load_fa3),
    "fa2": ("Flash Attention 2", _load_fa2),
    "flex": ("flex attention for windows, else torch SDPA", _load_flex),
    "sdpa": ("torch SDPA, on processors written out for short rows", lambda: _torch_attention),
}


def backend(device: torch.device, dtype: torch.dtype) -> tuple[str, Attend]:
    """What attention runs on for a device and dtype, with the reason, and the function; chosen once.

    Raises UserError if NANOCHAT_ATTN names something unknown or something that does not run here.
    """
    key = (device.type, dtype)
    if key not in _CHOSEN:
        # Called while compiling, the trial would become a part of the graph.
        assert not torch.compiler.is_compiling(), "call describe_backend before compiling"
        _CHOSEN[key] = _choose(device, dtype, os.environ.get("NANOCHAT_ATTN", "auto"))
    return _CHOSEN[key]


_CHOSEN: dict[tuple[str, torch.dtype], tuple[str, Attend]] = {}


def _choose(device: torch.device, dtype: torch.dtype, wanted: str) -> tuple[str, Attend]:
    if wanted not in ("auto", *_LOADERS):
        raise UserError(f"NANOCHAT_ATTN={wanted!r} is unknown; use auto, {', '.join(_LOADERS)}")
    gpu = ("fa3", "fa2", "flex", "sdpa")
    automatic = {"cuda": gpu, "cpu": ("cpp", "sdpa")}.get(device.type, ("sdpa",))
    failures = []
    for name in automatic if wanted == "auto" else (wanted,):
        title, load = _LOADERS[name]
        try:
            attend = load()
            if name != "sdpa":
                _try(attend, device, dtype)
        except Exception as error:  # kernels and compilers fail in ways of their own
            lines = str(error).strip().splitlines() or [type(error).__name__]
            failures.append(f"{title}: {lines[0][:100]}")
            continue
        why = f"; {'; '.join(failures)}" if failures else ""
        return f"{title} ({device.type}, {str(dtype)[6:]}{why})", attend
    raise UserError(f"NANOCHAT_ATTN={wanted} does not run here: {failures[0]}; use NANOCHAT_ATTN=auto")


def _try(attend: Attend, device: torch.device, dtype: torch.dtype) -> None:
    """One forward and backward pass on a short row with a window; raises whatever goes wrong."""
    # Whoever asks first may be decoding, and its choice is also training's.
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = (
            torch.zeros(1, 2 * _FLEX_BLOCK, heads, 64, dtype=dtype, device=device, requires_grad=True)
            for heads in (2, 1, 1)
        )
        torch.autograd.grad(attend(q, k, v, _FLEX_BLOCK // 2).sum(), (q, k, v))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Which attention kernel a device gets and why, for the log. Tries them, so call it before compiling."""
    description, _ = backend(device, dtype)
    return description
