"""The numbers that a training run multiplies (--precision), and the loss scaling that fp16 needs.

Weights, gradients and optimizer state are fp32 in all of them; only the products differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanochat.common import UserError, compute_dtype
from nanochat.fp8 import convert_to_float8, supports_fp8
from nanochat.gpt import GPT
from nanochat.mxfp4 import convert_to_mxfp4

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}

# fp16 gradients below 6e-8 vanish, so the loss is multiplied up to where they nearly overflow. Halving on every
# overflow and doubling after 2,000 good steps follows [Micikevicius 2018, arXiv 1710.03740].
_LARGEST_SCALE = 2.0**16
_GOOD_STEPS = 2000


@dataclass(frozen=True, slots=True)
class Precision:
    """What a run computes in. blocks: "fp8" or "mxfp4" for the matrices of the blocks; all else is in `dtype`."""

    dtype: torch.dtype
    blocks: str
    why: str

    def apply(self, model: GPT) -> str:
        """Convert the layers that need it, after the weights are set and before compiling; says what it did."""
        if not self.blocks:
            return f"{str(self.dtype)[6:]} ({self.why})"
        # The head stays: its products are made inside the loss, chunk by chunk.
        convert = convert_to_float8 if self.blocks == "fp8" else convert_to_mxfp4
        converted, total = convert(model.transformer)
        return f"{self.blocks} in {converted} of {total} layers of the blocks, else {str(self.dtype)[6:]} ({self.why})"


def choose_precision(name: str, device: torch.device) -> Precision:
    """Resolve --precision for a device. Raises UserError where the device has no such products."""
    if name == "auto":
        dtype, why = compute_dtype(device)
        return Precision(dtype, "", why)
    if name == "fp8":
        has_fp8, why = supports_fp8(device)
        if not has_fp8:
            raise UserError(f"--precision=fp8, but {why}; use --precision=auto")
        return Precision(_DTYPES[name], name, why)
    if name == "mxfp4":
        dtype, why = compute_dtype(device)
        return Precision(dtype, name, f"emulated; {why}")
    return Precision(_DTYPES[name], "", f"--precision={name}")


def first_loss_scale(dtype: torch.dtype) -> float:
    """What to multiply the loss by in the first step: 1 but for fp16."""
    return _LARGEST_SCALE if dtype == torch.float16 else 1.0


def next_loss_scale(scale: float, usable: bool, good_steps: int) -> float:
    """The scale of the next step. usable: the step had no overflow; good_steps: how many in a row had none.

    A scale of 1 stays: then an infinite gradient has other reasons than the scale.
    """
    if scale == 1.0:
        return scale
    if not usable:
        return max(scale / 2, 2.0)
    return min(2 * scale, _LARGEST_SCALE) if good_steps % _GOOD_STEPS == 0 else scale
