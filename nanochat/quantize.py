"""Weight-only quantisation for generation (--quantize): matrices in 8 bits, with a factor for each output.

Decoding reads every weight for every token, so that half the bytes are up to twice the speed. Activations, tables,
gates and the arithmetic stay as they are. What it costs is measured on a text and printed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nanochat.common import UserError
from nanochat.gpt import GPT, MLP, Attention, Block, Embedding, Linear
from nanochat.head_products import fp32_products
from nanochat.samples import PARAGRAPHS

KINDS = ("none", "int8")
_SMALLEST = 32  # a smaller matrix, such as a gate, is not worth it
# Rows up to which torch's int8 product is taken; for more, undoing the quantisation once is cheaper.
_FEW_ROWS = 16


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 (outputs, inputs) times an fp32 `scale` (outputs,)."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        matrix = linear.weight.detach().float()
        scale = matrix.abs().amax(dim=1).clamp_min(1e-12) / 127
        self.register_buffer("weight", (matrix / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if len(rows) <= _FEW_ROWS and x.device.type == "cpu":
            y = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.weight, self.scale.to(x.dtype))
            return y.view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)

    def in_fp32(self, x: torch.Tensor) -> torch.Tensor:
        """As Linear's; int8 is exact in bf16, so that nothing is rounded before the sum."""
        return fp32_products(x, self.weight) * self.scale


_FRAMES = (GPT, Block, Attention, MLP, nn.ModuleDict, nn.ModuleList)


def weight_layers(model: GPT) -> list[nn.Module] | None:
    """The layers that hold weights; None if a module is of another kind, such as the adapters of training."""
    modules = list(model.modules())
    layers = [module for module in modules if type(module) in (Linear, Embedding, Int8Linear)]
    frames = [module for module in modules if type(module) in _FRAMES]
    return layers if len(layers) + len(frames) == len(modules) else None


def quantize(model: GPT, kind: str, tokenizer: Any = None) -> str:
    """Replace the matrices of a model in place; a line that says what it saved and, with a tokenizer, what it cost.

    kind: one of KINDS. Raises UserError for another one.
    """
    if kind not in KINDS:
        raise UserError(f"--quantize={kind} is unknown; use {' or '.join(KINDS)}")
    if kind == "none":
        return "weights are not quantised"
    text = None if tokenizer is None else _sample_ids(model, tokenizer)
    before = None if text is None else _bits_per_byte(model, *text)
    old = _matrix_bytes(model)
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is Linear and min(module.weight.shape) >= _SMALLEST:
                setattr(parent, name, Int8Linear(module))
    line = f"int8 weights: {old / 1e6:.1f} MB of matrices become {_matrix_bytes(model) / 1e6:.1f} MB"
    if text is None or before is None:
        return line
    after = _bits_per_byte(model, *text)
    return f"{line}; loss on a sample text {before:.4f} -> {after:.4f} bits per byte ({after - before:+.4f})"


def _matrix_bytes(model: GPT) -> int:
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | Int8Linear)]
    return sum(t.nbytes for m in matrices for t in (*m.parameters(), *m.buffers()))


def _sample_ids(model: GPT, tokenizer: Any) -> tuple[list[int], int]:
    """Tokens of the sample paragraphs as far as the context goes, and the bytes that they stand for."""
    ids = tokenizer.encode("\n\n".join(PARAGRAPHS))[: min(model.config.sequence_len, 512) - 1]
    return [tokenizer.get_bos_token_id(), *ids], len(tokenizer.decode(ids).encode())


@torch.inference_mode()
def _bits_per_byte(model: GPT, ids: list[int], num_bytes: int) -> float:
    row = torch.tensor(ids, device=model.get_device())
    logits = model(row[None, :-1])[0]  # not the model's own loss, which reads the head's weights as they lie
    return F.cross_entropy(logits, row[1:], reduction="sum").item() / math.log(2) / num_bytes
