"""Intervals: published values, simple properties, and that they hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from nanochat.confidence import bootstrap_accuracies, bootstrap_mean_of_tasks, percentiles, wilson


@pytest.mark.parametrize(
    ("passed", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_values_of_newcombe_1998(passed, total, low, high):
    assert wilson(passed, total) == pytest.approx((low, high), abs=1e-4)
    assert wilson(total - passed, total) == pytest.approx((1 - high, 1 - low), abs=1e-4)


def test_without_a_trial_anything_is_possible_and_nonsense_is_refused():
    assert wilson(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="no share"):
        wilson(3, 2)


def test_binomial_draws_are_those_of_drawing_examples():
    correct = [True] * 30 + [False] * 50
    rng = np.random.default_rng(0)
    slow = rng.choice(np.array(correct), size=(20000, 80)).mean(axis=1)
    assert percentiles(bootstrap_accuracies(correct, 1, 20000)) == pytest.approx(percentiles(slow), abs=0.013)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_both_intervals_hold_the_true_share_as_often_as_they_say(share):
    rng = np.random.default_rng(2)
    held = {"wilson": 0, "bootstrap": 0}
    for trial in range(300):
        correct = (rng.random(200) < share).tolist()
        low, high = wilson(sum(correct), 200)
        held["wilson"] += low <= share <= high
        (found,), mean = bootstrap_mean_of_tasks([correct], [0.0], draws=500)
        assert mean == found, trial
        held["bootstrap"] += found.low <= share <= found.high
    assert all(0.9 <= count / 300 <= 0.99 for count in held.values()), held


def test_a_mean_of_tasks_is_surer_than_each_and_centred():
    tasks = [[i % 2 == 0 for i in range(100)] for _ in range(9)]
    each, mean = bootstrap_mean_of_tasks(tasks, [0.25] * 9)
    assert mean.low < (0.5 - 0.25) / 0.75 < mean.high
    assert mean.high - mean.low < 0.6 * (each[0].high - each[0].low) / 0.75


def test_the_report_takes_the_interval_of_chat_core_from_its_section():
    from nanochat.report_scores import intervals_of

    items = [{"ChatCORE metric": 0.2, "ChatCORE 95% low": 0.1, "ChatCORE 95% high": 0.3}]
    assert intervals_of([{"slug": "chat-evaluation-sft", "items": items}]) == {
        "ChatCORE": {"sft": (0.1, 0.3)}
    }
