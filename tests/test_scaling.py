"""The rules from depth to everything else, against the specification's tables."""

from __future__ import annotations

import pytest

from nanochat.common import UserError
from nanochat.network_config import GPTConfig
from nanochat.scaling import accumulation_steps, model_dimensions, plan_horizon, whole_rows
from nanochat.sizing import flops_per_token, scaling_parameters


def modern(depth: int) -> tuple[int, int]:
    config = GPTConfig.modern(**model_dimensions(depth))
    return scaling_parameters(config), flops_per_token(config)


REFERENCE, _ = modern(12)


@pytest.mark.parametrize(
    ("depth", "batch", "steps", "decay", "lr_scale"),
    [
        (4, 2**18, 528, 1.889903, 0.7071),
        (10, 2**19, 1605, 0.439626, 1.0),
        (12, 2**19, 2520, 0.280000, 1.0),
        (20, 2**20, 4980, 0.100188, 1.4142),
        (32, 2**21, 9600, 0.036750, 2.0),
    ],
)
def test_depth_table(depth, batch, steps, decay, lr_scale):
    params, flops = modern(depth)
    horizon = plan_horizon(params, REFERENCE, flops)
    assert (horizon.total_batch_size, horizon.num_steps) == (batch, steps)
    assert 0.28 * horizon.weight_decay_scale == pytest.approx(decay, abs=1e-6)
    assert horizon.lr_scale == pytest.approx(lr_scale, abs=5e-5)


def test_speedrun_and_other_horizons():
    params, flops = modern(24)
    assert plan_horizon(params, REFERENCE, flops, param_data_ratio=8).num_steps == 5568
    by_flops = plan_horizon(params, REFERENCE, flops, target_flops=1e19, param_data_ratio=-1)
    assert by_flops.num_steps == round(1e19 / (flops * by_flops.total_batch_size))
    assert plan_horizon(params, REFERENCE, flops, num_iterations=7, target_flops=1e19).num_steps == 7
    with pytest.raises(UserError, match="no horizon"):
        plan_horizon(params, REFERENCE, flops, param_data_ratio=0)
    with pytest.raises(UserError, match="less than one step"):
        plan_horizon(100, 100, 1, total_batch_size=1_000_000)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 6, 7, 8, 12])
def test_a_chosen_batch_divides_over_any_number_of_ranks(ranks):
    params, flops = modern(12)
    total = plan_horizon(params, REFERENCE, flops, row_tokens=2048 * ranks).total_batch_size
    assert total == 2**19 or 2**19 % ranks
    assert total == pytest.approx(2**19, rel=0.13)
    assert accumulation_steps(total, 4, 2048, ranks) >= 4


def test_batches_that_make_no_sense():
    assert whole_rows(100, 64) == 128 and whole_rows(10, 64) == 64
    with pytest.raises(UserError, match="--total-batch-size=0 must be"):
        plan_horizon(100, 100, 1, total_batch_size=0)


def test_dimensions():
    assert model_dimensions(20)["n_embd"] == 1280
    assert model_dimensions(11)["n_embd"] == 768  # rounded up to whole heads
    assert model_dimensions(4, 64, 64, 2) == {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_kv_head": 2}
    with pytest.raises(UserError, match="--depth=0"):
        model_dimensions(0)


def test_batch_that_does_not_divide_names_one_that_does():
    assert accumulation_steps(524288, 16, 2048, 8) == 2
    with pytest.raises(UserError, match="try --device-batch-size=16"):
        accumulation_steps(524288, 24, 2048, 1)
    with pytest.raises(UserError, match="--total-batch-size"):
        accumulation_steps(1000, 4, 512, 1)
