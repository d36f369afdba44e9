"""How far a score can be trusted: intervals that hold the true value 95 times out of 100."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z_95 = 1.959964  # standard deviations of a normal distribution
DRAWS = 2000


class Interval(NamedTuple):
    """Bounds of a 95 % confidence interval."""

    low: float
    high: float


def wilson(passed: int, total: int) -> Interval:
    """Of a share of successes; sensible for few trials and at 0 and 1. [Wilson 1927]"""
    if not 0 <= passed <= total:
        raise ValueError(f"{passed} of {total} is no share")
    if total == 0:
        return Interval(0.0, 1.0)
    share, square = passed / total, Z_95**2
    middle = (share + square / (2 * total)) / (1 + square / total)
    spread = Z_95 * math.sqrt(share * (1 - share) / total + square / (4 * total**2)) / (1 + square / total)
    # at 0 and total the bound is exactly 0 and 1, which rounding would miss
    low = 0.0 if passed == 0 else middle - spread
    return Interval(low, 1.0 if passed == total else middle + spread)


def bootstrap_accuracies(correct: Sequence[bool], seed: int, draws: int = DRAWS) -> np.ndarray:
    """(draws,) accuracies of as many examples drawn with replacement.

    The number of right ones among n draws from n examples is binomial, so no example has to be drawn.
    """
    count = len(correct)
    return np.random.default_rng(seed).binomial(count, sum(correct) / count, size=draws) / count


def percentiles(values: np.ndarray) -> Interval:
    """The middle 95 % of bootstrapped values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(low), float(high))


def bootstrap_mean_of_tasks(
    correct: Sequence[Sequence[bool]], baselines: Sequence[float], draws: int = DRAWS
) -> tuple[list[Interval], Interval]:
    """Intervals of the tasks' accuracies, and of the mean of their accuracies centred at the baselines.

    Examples are drawn again, tasks are not: this is what other questions of the same tasks would change.
    """
    drawn = [bootstrap_accuracies(values, seed, draws) for seed, values in enumerate(correct)]
    centred = [(a - baseline) / (1 - baseline) for a, baseline in zip(drawn, baselines, strict=True)]
    return [percentiles(values) for values in drawn], percentiles(np.mean(centred, axis=0))
