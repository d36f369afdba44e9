"""Causal attention with a sliding window, for training and for decoding with a cache.

Every backend gets (B, T, H, D) tensors. A window w lets a position see itself and the w before it;
w < 0 is unlimited. Flash Attention 3 is used on GPUs that run it, otherwise torch's own kernels.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.common import UserError


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Attention of a whole sequence to itself. q (B, T, H, D), k and v (B, T, Hkv, D) -> (B, T, H, D)."""
    if q.is_cuda and (flash3 := _flash3(q.dtype)) is not None:
        return flash3.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
    length = q.size(1)
    if q.device.type == "cpu" and length <= CPU_MATERIALISE_UP_TO:
        return _cpu_attention(q, k, v, window)
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

# torch's flash kernel takes 28 ms forward and backward for (16, 256, 4, 64) in bf16 on 2 cores, three times the
# products and the softmax written out, which cost B * H * T^2 memory (LOG 2026-11-21).
CPU_MATERIALISE_UP_TO = 1024


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


def _cpu_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    group = q.size(2) // k.size(2)
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    hidden = ~_visible(q.size(2), window, q.device)
    mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
    y = _Softmax.apply(q * q.size(-1) ** -0.5, k, v, mask)
    assert isinstance(y, torch.Tensor)
    return y.transpose(1, 2)


# --- choosing the backend ----------------------------------------------------------------------------


@functools.cache
def _flash3(dtype: torch.dtype):
    """The Flash Attention 3 module if it is installed and runs here, else None."""
    wanted = os.environ.get("NANOCHAT_ATTN", "auto")
    if wanted not in ("auto", "fa3", "sdpa"):
        raise UserError(f"NANOCHAT_ATTN={wanted!r} is unknown; use auto, fa3 or sdpa")
    if wanted == "sdpa" or dtype != torch.bfloat16:
        return None
    try:
        import flash_attn_interface  # pyright: ignore[reportMissingImports]

        probe = torch.zeros(1, 16, 1, 64, dtype=dtype, device="cuda")
        flash_attn_interface.flash_attn_func(probe, probe, probe, causal=True, window_size=(8, 0))
        return flash_attn_interface
    except (ImportError, RuntimeError) as error:
        if wanted == "fa3":
            raise UserError(f"NANOCHAT_ATTN=fa3, but Flash Attention 3 does not run here: {error}") from None
        return None


def describe_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Which attention kernel a device gets and why, for the log."""
    if device.type != "cuda":
        written_out = f"products and softmax written out up to {CPU_MATERIALISE_UP_TO} tokens, then "
        return (written_out if device.type == "cpu" else "") + f"torch SDPA ({device.type})"
    if _flash3(dtype) is not None:
        return f"Flash Attention 3 ({torch.cuda.get_device_name(device)}, {str(dtype)[6:]})"
    return "torch SDPA (Flash Attention 3 is not installed, does not run here, or the dtype is not bf16)"
