"""Weight-only quantisation for generation (--quantize): matrices in 8 bits, with a factor for each output.

Decoding reads every weight for every token, so that on a processor half the bytes are up to twice the speed; on a GPU
they take half the memory (LOG 2026-11-27). Activations, tables, gates and the arithmetic stay as they are. What it costs
is measured on a text and printed.

int8 has 127 equal steps up to the largest weight of an output; fp8 (e4m3) has 3 bits of mantissa. At the same
size it rounds trained matrices four times as coarsely, so int8 is the one to choose, unless what is printed says
otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nanochat.common import UserError
from nanochat.fp8 import supports_fp8
from nanochat.gpt import GPT, MLP, Attention, Block, Embedding, Linear
from nanochat.head_products import fp32_products
from nanochat.options import QUANTIZE_KINDS
from nanochat.samples import PARAGRAPHS

_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_SMALLEST = 32  # a smaller matrix, such as a gate, is not worth it
# Rows up to which torch's int8 product is taken; for more, undoing the quantisation once is cheaper.
_FEW_ROWS = 16


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is int8 or e4m3 (outputs, inputs) times an fp32 `scale` (outputs,)."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        matrix = linear.weight.detach().float()
        largest = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
        scale = matrix.abs().amax(dim=1).clamp_min(1e-12) / largest
        steps = matrix / scale[:, None]
        self.register_buffer("weight", (steps if dtype.is_floating_point else steps.round()).to(dtype))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if len(rows) <= _FEW_ROWS and x.device.type == "cpu" and self.weight.dtype == torch.int8:
            y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.weight, self.scale.to(x.dtype))
            return y.view(*x.shape[:-1], self.out_features)
        if x.dtype == torch.float16:  # whose range ends where sums of unscaled numbers do not
            return F.linear(x, (self.weight.float() * self.scale[:, None]).to(x.dtype))
        # The factor is fp32, as in decoding.
        return (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)

    def in_fp32(self, x: torch.Tensor) -> torch.Tensor:
        """As Linear's; 8 bits are exact in bf16, so that nothing is rounded before the sum."""
        return fp32_products(x, self.weight) * self.scale


_FRAMES = (GPT, Block, Attention, MLP, nn.ModuleDict, nn.ModuleList)


def weight_layers(model: GPT) -> list[nn.Module] | None:
    """The layers that hold weights; None if a module is of another kind, such as the adapters of training."""
    modules = list(model.modules())
    layers = [module for module in modules if type(module) in (Linear, Embedding, QuantizedLinear)]
    frames = [module for module in modules if type(module) in _FRAMES]
    return layers if len(layers) + len(frames) == len(modules) else None


def quantize(model: GPT, kind: str, tokenizer: Any = None) -> str:
    """Replace the matrices of a model in place; a line that says what it saved and, with a tokenizer, what it cost.

    kind: one of QUANTIZE_KINDS. Raises UserError for another one, and for fp8 where the hardware has none.
    """
    if kind not in QUANTIZE_KINDS:
        raise UserError(f"--quantize={kind} is unknown; use {' or '.join(QUANTIZE_KINDS)}")
    if kind == "none":
        return "weights are not quantised"
    supported, why = supports_fp8(model.get_device())
    if kind == "fp8" and not supported:
        raise UserError(f"--quantize=fp8 is for NVIDIA GPUs with FP8, and {why}; use --quantize=int8")
    return replace_matrices(model, kind, tokenizer)


def replace_matrices(model: GPT, kind: str, tokenizer: Any = None) -> str:
    """As quantize, for int8 or fp8 on any device; where fp8 is not supported, it is right but slow."""
    text = None if tokenizer is None else _sample_ids(model, tokenizer)
    before = None if text is None else _log_probs(model, text[0])
    old = _matrix_bytes(model)
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is Linear and min(module.weight.shape) >= _SMALLEST and "gate" not in name:
                setattr(parent, name, QuantizedLinear(module, _DTYPES[kind]))
    line = f"{kind} weights: {old / 1e6:.1f} MB of matrices become {_matrix_bytes(model) / 1e6:.1f} MB"
    if text is None or before is None:
        return line
    return f"{line}; {_cost(before, _log_probs(model, text[0]), *text)}"


def _matrix_bytes(model: GPT) -> int:
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    return sum(t.nbytes for m in matrices for t in (*m.parameters(), *m.buffers()))


def _sample_ids(model: GPT, tokenizer: Any) -> tuple[list[int], int]:
    """Tokens of the sample paragraphs as far as the context goes, and the bytes that they stand for."""
    ids = tokenizer.encode("\n\n".join(PARAGRAPHS))[: min(model.config.sequence_len, 512) - 1]
    return [tokenizer.get_bos_token_id(), *ids], len(tokenizer.decode(ids).encode())


@torch.inference_mode()
def _log_probs(model: GPT, ids: list[int]) -> torch.Tensor:
    """Log-probabilities (T - 1, V) of what follows each token but the last."""
    row = torch.tensor(ids[:-1], device=model.get_device())
    return model(row[None])[0].log_softmax(dim=-1)


def _cost(before: torch.Tensor, after: torch.Tensor, ids: list[int], num_bytes: int) -> str:
    """What changed. Noise may help on a text that is unlike the training's; relative entropy shows it even there."""
    targets, bits = torch.tensor(ids[1:], device=before.device), 1 / (math.log(2) * num_bytes)
    old, new = (bits * F.nll_loss(found, targets, reduction="sum").item() for found in (before, after))
    moved = bits * F.kl_div(after, before, reduction="sum", log_target=True).item()
    return (
        f"loss on a sample text {old:.4f} -> {new:.4f} bits per byte ({new - old:+.4f}); "
        f"relative entropy of the predictions {moved:.4f} bits per byte"
    )
