"""Schedules against the specification's values, and their bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.schedule import Schedule


def modern(num_steps: int) -> Schedule:
    return Schedule(
        num_steps, warmup_steps=40, warmdown_steps=round(0.65 * num_steps), final_lr_frac=0.05, momentum_end=0.90,
        weight_decay=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("step", "value"),
    [(0, 0.025), (39, 1), (1948, 1), (1949, 0.99974), (3758, 0.52487), (5566, 0.05026)],
)
def test_modern_learning_rate(step, value):
    assert modern(5567).lr_multiplier(step) == pytest.approx(value, abs=5e-6)


@pytest.mark.parametrize(("step", "value"), [(800, 1), (801, 0.995), (900, 0.5), (999, 0.005)])
def test_early_learning_rate(step, value):
    assert Schedule(1000, warmdown_steps=200).lr_multiplier(step) == pytest.approx(value)


@pytest.mark.parametrize(
    ("num_steps", "step", "value"),
    [
        (5567, 0, 0.85), (5567, 400, 0.97), (5567, 1949, 0.96998), (5567, 3758, 0.93499), (5567, 5566, 0.90002),
        (1000, 399, 0.9697), (1000, 400, 0.9646),
    ],
)  # fmt: skip
def test_momentum(num_steps, step, value):
    assert modern(num_steps).momentum(step) == pytest.approx(value, abs=5e-5)


def test_weight_decay_is_a_cosine():
    schedule = modern(1000)
    assert [schedule.decay(step) for step in (0, 500, 1000)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)


@given(st.integers(1, 300), st.integers(0, 50), st.integers(0, 300), st.floats(0, 1), st.integers(0, 1000))
def test_bounded_for_every_step(num_steps, warmup, warmdown, final, step):
    schedule = Schedule(num_steps, warmup, min(warmdown, num_steps), final, 100, momentum_end=0.9)
    assert 0 <= schedule.lr_multiplier(step) <= 1 + 1e-12
    assert 0.85 <= schedule.momentum(step) <= 0.97


@pytest.mark.parametrize("steps", [{"warmdown_steps": -1}, {"warmdown_steps": 11}, {"warmup_steps": -1}])
def test_a_ramp_longer_than_the_run_is_refused(steps):
    with pytest.raises(UserError, match="do not fit a run of 10"):
        Schedule(10, **steps)
