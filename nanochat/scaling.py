"""From `--depth` to every other number: width, tokens, batch size, learning rates, weight decay.

Rules of the modern architecture: tokens follow the parameters that scale, the batch follows the tokens to the
power 0.383, learning rates follow the square root of the batch, Muon's weight decay follows
sqrt(batch) / tokens. References are the 12-layer model and a batch of 2^19 tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanochat.common import UserError

REFERENCE_BATCH = 2**19
REFERENCE_DEPTH = 12
BATCH_EXPONENT = 0.383


def model_dimensions(
    depth: int, aspect_ratio: int = 64, head_dim: int = 128, kv_heads: int = 0
) -> dict[str, int]:
    """Fields of GPTConfig: width = depth * aspect_ratio, rounded up to whole heads. kv_heads: 0 for all."""
    for name, value in (("depth", depth), ("aspect-ratio", aspect_ratio), ("head-dim", head_dim)):
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    heads = -(-depth * aspect_ratio // head_dim)
    return {"n_layer": depth, "n_embd": heads * head_dim, "n_head": heads, "n_kv_head": kv_heads or heads}


@dataclass(frozen=True)
class Horizon:
    """How long to train and with which scaling of the reference hyper-parameters."""

    num_steps: int
    total_batch_size: int
    lr_scale: float
    weight_decay_scale: float
    source: str

    @property
    def num_tokens(self) -> int:
        return self.num_steps * self.total_batch_size


def plan_horizon(
    scaling_params: int,
    reference_params: int,
    flops_per_token: int,
    *,
    num_iterations: int = -1,
    target_flops: float = -1.0,
    param_data_ratio: float = 12.0,
    total_batch_size: int = -1,
    row_tokens: int = 1,
) -> Horizon:
    """Resolve steps and batch. Precedence: num_iterations, target_flops, param_data_ratio.

    scaling_params, reference_params: matrices plus head of this model and of the 12-layer one. row_tokens: of one row
    on every rank, which a batch that is chosen here is a multiple of.
    Batch and decay always follow the ratio's token count, so that short trials of a depth keep its settings.
    """
    # The ratio cancels in D / D_ref; a disabled ratio (<= 0) therefore still yields a batch and a decay.
    ratio = param_data_ratio if param_data_ratio > 0 else 1.0
    tokens, reference_tokens = int(ratio * scaling_params), ratio * reference_params
    if total_batch_size == -1:
        ideal = REFERENCE_BATCH * (tokens / reference_tokens) ** BATCH_EXPONENT
        total_batch_size = whole_rows(2 ** round(math.log2(ideal)), row_tokens)
    if total_batch_size < 1:
        raise UserError(f"--total-batch-size={total_batch_size} must be at least 1, or -1")
    batch_ratio = total_batch_size / REFERENCE_BATCH
    if num_iterations > 0:
        steps, source = num_iterations, "--num-iterations"
    elif target_flops > 0:
        steps, source = round(target_flops / (flops_per_token * total_batch_size)), "--target-flops"
    elif param_data_ratio > 0:
        steps, source = tokens // total_batch_size, "--target-param-data-ratio"
    else:
        raise UserError("no horizon: give --num-iterations, --target-flops or --target-param-data-ratio")
    if steps < 1:
        raise UserError(
            f"{source} gives less than one step of {total_batch_size:,} tokens; lower --total-batch-size"
        )
    lr_scale = math.sqrt(batch_ratio)
    return Horizon(steps, total_batch_size, lr_scale, lr_scale * reference_tokens / tokens, source)


def whole_rows(total_batch_size: int, row_tokens: int) -> int:
    """The batch, or where it is not a multiple of row_tokens a near one that is, with divisors for micro-batches."""
    if total_batch_size % row_tokens == 0:
        return total_batch_size
    powers = [power for power in (8, 4, 2) if 4 * power * row_tokens <= total_batch_size]
    unit = row_tokens * (powers[0] if powers else 1)
    return max(round(total_batch_size / unit), 1) * unit


def accumulation_steps(total_batch_size: int, device_batch_size: int, seq_len: int, world_size: int) -> int:
    """Micro-batches per rank and step; a UserError that names a fitting size if they do not divide."""
    micro = device_batch_size * seq_len * world_size
    if device_batch_size < 1 or micro > total_batch_size or total_batch_size % micro:
        fitting = [
            b for b in range(device_batch_size, 0, -1) if total_batch_size % (b * seq_len * world_size) == 0
        ]
        hint = f"--device-batch-size={fitting[0]}" if fitting else "--total-batch-size"
        raise UserError(
            f"total batch {total_batch_size:,} is not a multiple of {device_batch_size} rows x {seq_len} tokens"
            f" x {world_size} ranks = {micro:,}; try {hint}"
            + ("" if fitting else f" = a multiple of {micro:,}")
        )
    return total_batch_size // micro
