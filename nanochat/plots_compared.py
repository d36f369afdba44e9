"""Curves of several runs in one picture: loss and bits per byte per stage, and the reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nanochat.plots import (
    COLORS,
    INK,
    LANGUAGE_STAGES,
    STAGE_NAMES,
    Curve,
    curve,
    new_figure,
    step_axis,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Events = Mapping[str, Sequence[Mapping]]

RUN_COLORS = (*COLORS.values(), "#6b737c", "#3f7d3a", "#a3772b")
_METRICS = (
    ("train/loss", "Training loss", "local mean; nats per supervised token"),
    ("val/bpb", "Validation bits per byte", "lower is better; independent of the tokenizer"),
    ("reward", "Reward in reinforcement learning", "local mean; share of correct answers in rollouts"),
)


def compared_figures(runs: Mapping[str, Events]) -> list[tuple[str, Figure]]:
    """(caption, figure) of every metric that some run has; runs: events by stage, by name of the run."""
    found = []
    for key, title, subtitle in _METRICS:
        drawing = compared_figure(runs, key, title, subtitle)
        if drawing is not None:
            found.append((title, drawing))
    return found


def compared_figure(runs: Mapping[str, Events], key: str, title: str, subtitle: str) -> Figure | None:
    """One panel per stage, one line per run; None if no run has two values of the metric."""
    curves = {
        stage: {name: points for name, events in runs.items()
                if len((points := curve(events.get(stage, []), key)).steps) > 1}
        for stage in (LANGUAGE_STAGES if key == "train/loss" else STAGE_NAMES)
    }  # fmt: skip
    curves = {stage: by_run for stage, by_run in curves.items() if by_run}
    if not curves:
        return None
    with style():
        drawing, axes = new_figure(title, subtitle, len(curves))
        for axis, (stage, by_run) in zip(axes, curves.items(), strict=True):
            axis.set_title(STAGE_NAMES[stage], color=INK, pad=8)
            _draw(axis, by_run, list(runs), is_noisy=key != "val/bpb")
        axes[0].legend(frameon=False, fontsize=9)
    return drawing


def _draw(axis: Axes, by_run: Mapping[str, Curve], names: Sequence[str], is_noisy: bool) -> None:
    longest = max(by_run.values(), key=lambda points: points.steps[-1])
    step_axis(axis, longest.steps)
    for name, points in by_run.items():
        values = points.smoothed() if is_noisy else points.values
        color = RUN_COLORS[names.index(name) % len(RUN_COLORS)]
        axis.plot(points.steps, values, color=color, label=f"{name}  {values[-1]:.3f}")
