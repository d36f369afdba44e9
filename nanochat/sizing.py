"""Sizes that follow from a model's shape by arithmetic alone: parameters, FLOPs, horizon, disk.

Plans and dry runs use these formulas, so that they answer at once and allocate nothing. Tests hold them
against the tables of published sizes and against a real model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nanochat.scaling import REFERENCE_DEPTH, Horizon, model_dimensions, plan_horizon


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the size of a model: depth, and the constants that turn it into widths."""

    depth: int
    vocab_size: int = 32768
    sequence_len: int = 2048
    aspect_ratio: int = 64
    head_dim: int = 128
    window_pattern: str = "SSSL"
    kv_heads: int = 0  # 0: as many as query heads
    arch: str = "modern"
    tie_embeddings: bool = False

    @property
    def width(self) -> int:
        return model_dimensions(self.depth, self.aspect_ratio, self.head_dim).n_embd

    @property
    def num_heads(self) -> int:
        return self.width // self.head_dim

    @property
    def kv_width(self) -> int:
        return (self.kv_heads or self.num_heads) * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        return 64 * math.ceil(self.vocab_size / 64)


def parameters(shape: Shape) -> dict[str, int]:
    """Parameters by group, and their total."""
    d, kv, modern = shape.width, shape.kv_width, shape.arch == "modern"
    table = shape.padded_vocab_size * d
    value_layers = math.ceil(shape.depth / 2) if modern else 0
    gates = value_layers * (kv // shape.head_dim) * 12
    groups = {
        "wte": 0 if shape.tie_embeddings else table,  # counted as the head
        "value_embeds": value_layers * shape.padded_vocab_size * kv,
        "lm_head": table,
        "transformer_matrices": shape.depth * (10 * d * d + 2 * d * kv) + gates,
        "scalars": 2 * shape.depth + 26 if modern else 0,  # residual scales, smear and backout
    }
    return groups | {"total": sum(groups.values())}


def scaling_parameters(shape: Shape) -> int:
    """The parameters that the data horizon is measured in: matrices and output head."""
    groups = parameters(shape)
    return groups["transformer_matrices"] + groups["lm_head"]


def windows(shape: Shape) -> list[int]:
    """Attention window of each layer in tokens; the last layer always sees everything."""
    length = shape.sequence_len
    short = 128 * math.ceil(math.ceil(length / 4) / 128)
    pattern = shape.window_pattern.upper() if shape.arch == "modern" else "L"
    sizes = [short if pattern[i % len(pattern)] == "S" else length for i in range(shape.depth)]
    return [*sizes[:-1], length]


def flops_per_token(shape: Shape) -> int:
    """Forward and backward FLOPs of one token: 6 per matrix parameter, 12 per attended channel."""
    attention = sum(12 * shape.width * min(window, shape.sequence_len) for window in windows(shape))
    return 6 * scaling_parameters(shape) + attention


def ratio_horizon(shape: Shape, ratio: float) -> Horizon:
    """Steps and batch that base_train will choose for `ratio` tokens per scaling parameter."""
    reference = replace(shape, depth=REFERENCE_DEPTH)
    return plan_horizon(
        scaling_parameters(shape),
        scaling_parameters(reference),
        flops_per_token(shape),
        param_data_ratio=ratio,
    )


def checkpoint_bytes(shape: Shape) -> int:
    """Size of one complete checkpoint: fp32 weights and optimizer state."""
    groups = parameters(shape)
    matrices = groups["transformer_matrices"]
    return 4 * groups["total"] + 8 * (groups["total"] - matrices) + 4 * matrices


SHARD_BYTES = 100_000_000
_SHARD_CHARS = 250_000_000
_CHARS_PER_TOKEN = 4.8  # of a 32K vocabulary on web text
_PACKED_SHARE = 0.65  # share of the text that best-fit packing keeps when it crops what does not fit


def shards_needed(tokens: int) -> int:
    """Pretraining shards to download for a horizon, the validation shard included."""
    return max(8, math.ceil(tokens * _CHARS_PER_TOKEN / _SHARD_CHARS / _PACKED_SHARE) + 1)
