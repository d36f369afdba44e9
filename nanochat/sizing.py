"""Sizes that follow from a network's configuration by arithmetic alone: parameters, FLOPs, horizon, disk.

Plans and dry runs use these formulas, so that they answer at once and allocate nothing. Tests hold them
against the tables of published sizes and against a real model.
"""

from __future__ import annotations

import math
from dataclasses import replace

from nanochat.network_config import SMEAR_CHANNELS, GPTConfig
from nanochat.scaling import REFERENCE_DEPTH, Horizon, model_dimensions, plan_horizon


def parameters(config: GPTConfig, kv_heads: int = 0) -> dict[str, int]:
    """Parameters by group, and their total. kv_heads: counted instead of the network's own."""
    d, heads = config.n_embd, kv_heads or config.n_kv_head
    kv, table = heads * config.head_dim, config.padded_vocab_size * d
    gates = config.num_value_embeds * heads * config.ve_gate_channels
    smear = config.use_smear * (SMEAR_CHANNELS + 1)
    groups = {
        "wte": 0 if config.tie_embeddings else table,  # counted as the head
        "value_embeds": config.num_value_embeds * config.padded_vocab_size * kv,
        "lm_head": table,
        "transformer_matrices": config.n_layer * (10 * d * d + 2 * d * kv) + gates,
        "scalars": config.use_lambdas * 2 * config.n_layer + smear + config.use_backout,
    }
    return groups | {"total": sum(groups.values())}


def scaling_parameters(config: GPTConfig, kv_heads: int = 0) -> int:
    """The parameters that the data horizon is measured in: matrices and output head."""
    groups = parameters(config, kv_heads)
    return groups["transformer_matrices"] + groups["lm_head"]


def flops_per_token(config: GPTConfig) -> int:
    """Forward and backward FLOPs of one token: 6 per matrix parameter, 12 per attended channel."""
    attended = sum(min(window, config.sequence_len) for window in config.window_sizes)
    return 6 * scaling_parameters(config) + 12 * config.n_embd * attended


def ratio_horizon(config: GPTConfig, ratio: float) -> Horizon:
    """What base_train will choose for `ratio` tokens per scaling parameter, with its default proportions."""
    reference = replace(config, **model_dimensions(REFERENCE_DEPTH))
    return plan_horizon(
        scaling_parameters(config),
        scaling_parameters(reference),
        flops_per_token(config),
        param_data_ratio=ratio,
    )


def checkpoint_bytes(config: GPTConfig) -> int:
    """Size of one complete checkpoint: fp32 weights and optimizer state."""
    groups = parameters(config)
    matrices = groups["transformer_matrices"]
    return 4 * groups["total"] + 8 * (groups["total"] - matrices) + 4 * matrices


SHARD_BYTES = 100_000_000
_SHARD_CHARS = 250_000_000
_CHARS_PER_TOKEN = 4.8  # of a 32K vocabulary on web text
_PACKED_SHARE = 0.65  # share of the text that best-fit packing keeps when it crops what does not fit


def shards_needed(tokens: int) -> int:
    """Pretraining shards to download for a horizon, the validation shard included."""
    return max(8, math.ceil(tokens * _CHARS_PER_TOKEN / _SHARD_CHARS / _PACKED_SHARE) + 1)
