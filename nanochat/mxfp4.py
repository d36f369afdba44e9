"""MXFP4 training in emulation: weights and activations of linear layers are rounded to 4 bits, for research.

The format is that of the OCP Microscaling specification 1.0: blocks of 32 numbers along the dimension that a product
sums over, each number E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), each block with one E8M0 scale, a
power of two. Products are made in the usual dtype of numbers rounded so, which is what hardware computes up to the
order of summation, at no gain in speed. Gradients pass the rounding as if it were not there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 32
_LARGEST = 6.0  # of E2M1
_LARGEST_EXPONENT = 2  # 6 = 1.5 * 2^2
_SCALE_EXPONENTS = (-127, 127)  # of E8M0


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 values of x (..., C), C a multiple of 32, and exponents (..., C / 32, 1) of the scales; both fp32.

    The largest magnitude of a block decides the scale, which puts it between 4 and 8; beyond 6 it saturates. Ties go
    to the even neighbour. A block with NaN or infinity has the scale NaN.
    """
    assert x.size(-1) % BLOCK == 0, f"{x.size(-1)} numbers are no whole blocks of {BLOCK}"
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    # x = m 2^e with m in [0.5, 1), so the exponent of the leading bit is e - 1; exact, unlike a logarithm.
    exponent = torch.frexp(largest).exponent.float() - 1 - _LARGEST_EXPONENT
    exponent = torch.where(largest > 0, exponent, _SCALE_EXPONENTS[0]).clamp(*_SCALE_EXPONENTS)
    scaled = blocks * torch.exp2(-exponent)
    return _round_to_e2m1(scaled).flatten(-2), torch.where(largest.isfinite(), exponent, torch.nan)


def _round_to_e2m1(x: Tensor) -> Tensor:
    """To the nearest E2M1 number: steps of 0.5 below 2, of 1 below 4, of 2 above; ties to even, saturating."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    # Half of an even number of steps has the mantissa bit 0, so rounding the count half to even is right.
    return ((size / step).round() * step).clamp(max=_LARGEST).copysign(x)


def dequantise(elements: Tensor, exponents: Tensor) -> Tensor:
    """The fp32 numbers that elements and exponents of quantise stand for."""
    return (elements.unflatten(-1, (-1, BLOCK)) * torch.exp2(exponents)).flatten(-2)


def straight_through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to MXFP4 along its last dimension, in a dtype; the gradient is that of x unrounded."""
    return _StraightThrough.apply(x, dtype)  # pyright: ignore[reportReturnType]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.input_dtype = x.dtype  # type: ignore[attr-defined]
        return dequantise(*quantise(x)).to(dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.input_dtype), None  # type: ignore[attr-defined]


class MXFP4Linear(nn.Linear):
    """A linear layer that multiplies rounded activations with rounded weights. Shares the weight it is made of."""

    def __init__(self, linear: nn.Linear) -> None:
        has_bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, has_bias, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        weight = straight_through(self.weight, input.dtype)
        return F.linear(straight_through(input, input.dtype), weight, bias)


def convert_to_mxfp4(model: nn.Module) -> tuple[int, int]:
    """Replace the linear layers with whole blocks of inputs, in place; returns how many of how many.

    Call it after weights are set and before compiling. Parameters are the same objects under the same names.
    """
    linears = [(p, n, m) for p in model.modules() for n, m in p.named_children() if isinstance(m, nn.Linear)]
    chosen = [(parent, name, linear) for parent, name, linear in linears if linear.in_features % BLOCK == 0]
    for parent, name, linear in chosen:
        setattr(parent, name, MXFP4Linear(linear))
    return len(chosen), len(linears)
