"""Products of the output head in fp32 where activations have fewer bits, for generation. Without gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# On a processor more rows than these are scored, not sampled from, and tiles of bf16 are four times as fast.
_MOST_ROWS = 256
# Of the matrix, as many rows are fp32 at a time as stay in a processor's cache; 2048 took 1.3 times as long.
_ROWS = 512


def fp32_products(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., C) times weight (V, C) transposed in fp32; the weight is rounded to the dtype of x as everywhere.

    Many rows on a processor are multiplied in the dtype of x.
    """
    if x.is_cuda and x.dtype != torch.float32:
        rows = x.reshape(-1, x.size(-1))  # the tensor cores sum in fp32 anyway
        return torch.mm(rows, weight.to(x.dtype).t(), out_dtype=torch.float32).view(*x.shape[:-1], -1)
    if x.dtype == weight.dtype == torch.float32:
        return F.linear(x, weight)
    if x.numel() > _MOST_ROWS * x.size(-1):
        return F.linear(x, weight.to(x.dtype)).float()
    y = x.new_empty(*x.shape[:-1], weight.size(0), dtype=torch.float32)
    for part, out in zip(weight.split(_ROWS), y.split(_ROWS, dim=-1), strict=True):
        out.copy_(F.linear(x.float(), part.to(x.dtype).float()))
    return y
