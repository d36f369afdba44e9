"""Sizes by arithmetic: the published tables, and a real model."""

from __future__ import annotations

import pytest

from nanochat.network_config import GPTConfig
from nanochat.scaling import model_dimensions
from nanochat.sizing import (
    checkpoint_bytes,
    flops_per_token,
    parameters,
    ratio_horizon,
    scaling_parameters,
    shards_needed,
)

# depth, scaling parameters, all parameters, FLOPs per token; vocabulary 32,768, pattern SSSL
PUBLISHED = [
    (4, 11_534_384, 36_700_242, 80_216_352),
    (12, 110_100_912, 286_261_730, 759_695_904),
    (20, 435_160_240, 896_533_746, 2_886_212_640),
    (24, 729_810_624, 1_384_122_122, 4_775_225_472),
    (32, 1_677_724_672, 2_818_575_450, 10_770_991_104),
]


@pytest.mark.parametrize(("depth", "scaling", "total", "flops"), PUBLISHED)
def test_published_sizes(depth, scaling, total, flops):
    config = GPTConfig.modern(**model_dimensions(depth))
    assert scaling_parameters(config) == scaling
    assert parameters(config)["total"] == total
    assert flops_per_token(config) == flops


@pytest.mark.parametrize(
    ("depth", "batch", "steps"), [(4, 2**18, 528), (12, 2**19, 2520), (20, 2**20, 4980), (32, 2**21, 9600)]
)
def test_published_horizons_at_ratio_12(depth, batch, steps):
    horizon = ratio_horizon(GPTConfig.modern(**model_dimensions(depth)), 12)
    assert (horizon.total_batch_size, horizon.num_steps) == (batch, steps)


def test_the_flagship_trains_5568_steps_and_needs_about_170_shards():
    horizon = ratio_horizon(GPTConfig.modern(**model_dimensions(24)), 8)
    assert (horizon.total_batch_size, horizon.num_steps) == (2**20, 5568)
    assert 165 <= shards_needed(horizon.num_tokens) <= 180


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig.modern(vocab_size=1000, window_pattern="L", **model_dimensions(4, 64, 64)),
        GPTConfig.modern(vocab_size=512, window_pattern="SSL", **model_dimensions(3, 32, 32)),
        GPTConfig.modern(vocab_size=1000, sequence_len=256, **model_dimensions(4, 64, 64, kv_heads=2)),
        GPTConfig.modern(vocab_size=512, tie_embeddings=True, **model_dimensions(5, 32, 32)),
        GPTConfig.modern(vocab_size=512, use_smear=False, ve_gate_channels=32, **model_dimensions(2)),
        GPTConfig.classic(vocab_size=512, sequence_len=64, **model_dimensions(2, 32, 16, kv_heads=1)),
    ],
)
def test_formulas_agree_with_a_real_model(config):
    import torch

    from nanochat.gpt import GPT

    with torch.device("meta"):
        model = GPT(config)

    def count(name: str) -> int:
        return sum(p.numel() for p in model.get_submodule(name).parameters())

    groups = parameters(config)
    assert groups["total"] == sum(p.numel() for p in model.parameters()) == sum(groups.values()) / 2
    assert groups["wte"] == (0 if config.tie_embeddings else count("transformer.wte"))
    assert groups["value_embeds"] == count("value_embeds") and groups["lm_head"] == count("lm_head")
    assert groups["transformer_matrices"] == count("transformer.h")
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    matrices = sum(count(name) for name in linear if name != "smear_gate")
    assert scaling_parameters(config) == matrices
    attended = sum(min(window, config.sequence_len) for window in config.window_sizes)
    assert flops_per_token(config) == 6 * matrices + 12 * config.n_embd * attended


def test_a_checkpoint_is_at_least_its_fp32_weights():
    assert checkpoint_bytes(GPTConfig()) > 4 * parameters(GPTConfig())["total"]
