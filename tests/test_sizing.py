"""Sizes by arithmetic: the published tables, and a real model."""

from __future__ import annotations

import pytest

from nanochat.sizing import (
    Shape,
    checkpoint_bytes,
    flops_per_token,
    parameters,
    ratio_horizon,
    scaling_parameters,
    shards_needed,
    windows,
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
    shape = Shape(depth)
    assert scaling_parameters(shape) == scaling
    assert parameters(shape)["total"] == total
    assert flops_per_token(shape) == flops


@pytest.mark.parametrize(
    ("depth", "batch", "steps"), [(4, 2**18, 528), (12, 2**19, 2520), (20, 2**20, 4980), (32, 2**21, 9600)]
)
def test_published_horizons_at_ratio_12(depth, batch, steps):
    horizon = ratio_horizon(Shape(depth), 12)
    assert (horizon.total_batch_size, horizon.num_steps) == (batch, steps)


def test_the_flagship_trains_5568_steps_and_needs_about_170_shards():
    horizon = ratio_horizon(Shape(24), 8)
    assert (horizon.total_batch_size, horizon.num_steps) == (2**20, 5568)
    assert 165 <= shards_needed(horizon.num_tokens) <= 180


@pytest.mark.parametrize(
    "shape",
    [
        Shape(4, vocab_size=1000, sequence_len=256, head_dim=64, window_pattern="L"),
        Shape(3, vocab_size=512, sequence_len=512, aspect_ratio=32, head_dim=32, window_pattern="SSL"),
        Shape(4, vocab_size=1000, sequence_len=256, head_dim=64, kv_heads=2),
        Shape(2, vocab_size=512, sequence_len=64, aspect_ratio=32, head_dim=16, kv_heads=1, arch="classic"),
    ],
)
def test_formulas_agree_with_a_real_model(shape):
    import torch

    from nanochat.gpt import GPT, GPTConfig

    modern = {"window_pattern": shape.window_pattern} if shape.arch == "modern" else {}
    config = getattr(GPTConfig, shape.arch)(
        sequence_len=shape.sequence_len, vocab_size=shape.vocab_size, n_layer=shape.depth,
        n_head=shape.num_heads, n_kv_head=shape.kv_heads or shape.num_heads, n_embd=shape.width, **modern,
    )  # fmt: skip
    with torch.device("meta"):
        model = GPT(config)
    assert parameters(shape)["total"] == sum(p.numel() for p in model.parameters())
    counted = model.num_scaling_params()
    assert scaling_parameters(shape) == counted["transformer_matrices"] + counted["lm_head"]
    assert flops_per_token(shape) == model.estimate_flops()


def test_the_last_window_is_long_and_short_ones_are_a_quarter():
    assert windows(Shape(5)) == [512, 512, 512, 2048, 2048]


def test_a_checkpoint_is_at_least_its_fp32_weights():
    assert checkpoint_bytes(Shape(12)) > 4 * parameters(Shape(12))["total"]
