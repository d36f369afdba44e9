"""How much memory a training step takes at its peak, by kind, from sizes alone.

The peak is in one of two places: where the loss is computed, with all activations alive, or in the optimizer, which
works on copies of all matrices. Values that uncompiled blocks keep were counted with torch's hooks on saved tensors
(LOG 2026-11-25); those of compiled ones are an estimate. All sizes are bytes per rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.native import find_compiler
from nanochat.network_config import GPTConfig
from nanochat.sizing import parameters

# Logits at a time. Large enough to keep a GPU's matrix units busy, small enough for a processor's cache.
CHUNK_LOGITS_CUDA, CHUNK_LOGITS_ELSEWHERE = 2**26, 2**21
# torch's flash kernel takes 28 ms forward and backward for (16, 256, 4, 64) in bf16 on 2 cores, three times the
# products and the softmax written out, which cost B * H * T^2 memory (LOG 2026-11-21).
CPU_MATERIALISE_UP_TO = 1024


@dataclass(frozen=True, slots=True)
class Setting:
    """What decides the memory besides the network."""

    rows: int  # per micro-batch
    world_size: int = 1
    accumulation: int = 1  # micro-batches per step; from two on gradients are there in the forward pass
    compute_bytes: int = 2  # of a number in products and activations
    on_gpu: bool = True
    compiled: bool = True
    recompute: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by kind. update: copies that the optimizer works on, when activations are gone."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    update: float
    gradients_stay: bool  # during the forward pass, because of accumulation

    @property
    def peak(self) -> float:
        """Bytes at the fullest moment of a step."""
        forward = self.activations + self.logits + (self.gradients if self.gradients_stay else 0.0)
        return self.weights + self.optimizer + max(forward, self.gradients + self.update)


def training_memory(config: GPTConfig, setting: Setting) -> Memory:
    """Memory of a training step by kind."""
    groups = parameters(config)
    matrices, tables = groups["transformer_matrices"], groups["wte"] + groups["value_embeds"]
    rest = groups["total"] - matrices - tables
    # On GPUs that compute in bf16 the embedding tables, with gradients and moments, are bf16 as well.
    table_bytes = 2 if setting.on_gpu and setting.compute_bytes == 2 else 4
    weights = 4 * (matrices + rest) + table_bytes * tables
    moments = 4 * matrices + 8 * rest + 2 * table_bytes * tables
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=moments / setting.world_size,
        activations=_activations(config, setting),
        logits=_loss(config, setting),
        update=_UPDATE_BYTES * matrices,
        gradients_stay=setting.accumulation > 1,
    )


def training_bytes(config: GPTConfig, rows: int, world_size: int, on_gpu: bool = True) -> int:
    """Peak memory per rank with micro-batches of `rows` sequences: bf16 on GPUs, fp32 elsewhere, with accumulation."""
    setting = Setting(rows, world_size, accumulation=2, compute_bytes=2 if on_gpu else 4, on_gpu=on_gpu)
    return round(training_memory(config, setting).peak)


# Stacks of all gradients and new weights (8), and the largest group's working copies (LOG 2026-11-25).
_UPDATE_BYTES = 11


def _activations(config: GPTConfig, setting: Setting) -> float:
    """What the forward pass keeps for the backward pass."""
    tokens, size = setting.rows * config.sequence_len, setting.compute_bytes
    # Around the blocks: embeddings, smear, backout, norms.
    outside = (4 + config.use_smear + config.use_backout) * config.n_embd
    layer = _compiled_layer(config, setting) if setting.compiled else _eager_layer(config, setting)
    kept = config.n_layer * layer
    if setting.recompute:  # inputs of every block, and one block in full
        kept = config.n_layer * (1 + config.use_lambdas) * config.n_embd + layer
    value_embeds = config.num_value_embeds * config.kv_width
    # In less than fp32 every matrix is kept in the dtype of its products, too.
    casts = size * parameters(config)["transformer_matrices"] if size < 4 else 0
    return tokens * size * (outside + kept + value_embeds) + casts


def _eager_layer(config: GPTConfig, setting: Setting) -> float:
    """Values per token that one block keeps: inputs of norms and products, heads, probabilities."""
    c, kv = config.n_embd, config.kv_width
    residual = (3 + config.use_lambdas) * c  # the stream, scaled, and after attention; one norm
    attention = c + kv + c + 2 * kv + c  # q and k before their norms; q, k and v; the result
    mlp = 1 * c + 8 * c
    fp32_norms = 3 * c + kv if setting.compute_bytes < 4 else 0  # norms keep their inputs in fp32
    return residual + attention + mlp + fp32_norms + _probabilities(config, setting)


def _compiled_layer(config: GPTConfig, setting: Setting) -> float:
    """The same where the compiler computes norms, rotations and squares again in the backward pass.

    19 values per channel, counting keys and values: an H200 took 43.6 GiB for depth 20 with 16 rows (LOG 2026-11-26).
    """
    return 17 * config.n_embd + 2 * config.kv_width + _probabilities(config, setting)


def _probabilities(config: GPTConfig, setting: Setting) -> float:
    if setting.on_gpu or (setting.compute_bytes == 4 and find_compiler()):
        return 0  # kernels make them again
    return config.n_head * config.sequence_len if config.sequence_len <= CPU_MATERIALISE_UP_TO else 0


def _loss(config: GPTConfig, setting: Setting) -> float:
    """A chunk of logits with what its loss needs, the head's gradient, and that of the hidden states."""
    tokens, size = setting.rows * config.sequence_len, setting.compute_bytes
    chunk = min(CHUNK_LOGITS_CUDA if setting.on_gpu else CHUNK_LOGITS_ELSEWHERE, tokens * config.vocab_size)
    head = config.padded_vocab_size * config.n_embd
    head_bytes = 4 + size + (size if size < 4 else 0)  # sum, one chunk's part, the head in low precision
    per_logit = size + (8 if setting.compiled else 20)
    # The compiler keeps every chunk's part of the gradient and adds them up at once.
    if setting.compiled and setting.on_gpu:
        head_bytes += size * (tokens * config.vocab_size // chunk - 1)
    return chunk * per_logit + head_bytes * head + 2 * tokens * config.n_embd * size
