"""Pictures of a run: curves from metrics.jsonl of the checkpoints, scores from the report.

matplotlib is imported where it draws. One style for all: a colour per stage, a title that says what is
shown, values written at the end of the lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanochat.common import UserError
from nanochat.metrics import read_metrics
from nanochat.options import STAGE_FOLDERS
from nanochat.report_render import CHANCE, TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGE_NAMES = {
    "base": "Pretraining", "mid": "Mid-training", "sft": "Finetuning", "dpo": "Preferences", "rl": "Reinforcement",
}  # fmt: skip
COLORS = {"base": "#2f5d8c", "mid": "#2b9a8b", "sft": "#e08a1e", "dpo": "#7a5aa6", "rl": "#b8456b"}
LANGUAGE_STAGES = ("base", "mid", "sft")  # whose loss is that of the next token
INK, MUTED, RULE = "#22262b", "#7b838c", "#e4e6e9"

_STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.dpi": 160, "font.size": 10,
    "font.family": "sans-serif", "text.color": INK, "axes.edgecolor": "#c9cdd2", "axes.labelcolor": MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True,
    "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": RULE, "grid.linewidth": 0.8,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "xtick.major.size": 3, "ytick.major.size": 0, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "lines.linewidth": 1.9, "lines.solid_capstyle": "round",
}  # fmt: skip


# --- metrics -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over optimizer steps."""

    steps: np.ndarray
    values: np.ndarray

    def smoothed(self) -> np.ndarray:
        """Mean over a centred window of a twentieth of the curve; it does not lag as a running mean does."""
        sums, count = np.concatenate([[0.0], np.cumsum(self.values)]), len(self.values)
        places = np.arange(count)
        radius = np.minimum(max(1, count // 40), places)  # the first values fall fast: narrow there
        start, stop = places - radius, np.minimum(places + radius + 1, count)
        return (sums[stop] - sums[start]) / (stop - start)


def curve(events: Sequence[Mapping], key: str) -> Curve:
    """The finite values of a key by step; steps repeated after a resume count once, with the later value."""
    points = {}
    for event in events:
        value = event.get(key)
        if isinstance(value, int | float) and np.isfinite(value):
            points[event["step"]] = float(value)
    steps = sorted(points)
    return Curve(np.array(steps), np.array([points[step] for step in steps]))


def find_metrics(base: Path, since: float = 0.0) -> dict[str, list[dict]]:
    """Events by stage: of the model that commands take where none is named, else of the most recent one.

    Only of files that were written after `since` (unix s).
    """
    from nanochat.checkpoint_manager import find_model_tag

    found = {}
    for stage, folder in STAGE_FOLDERS.items():
        ages = {path: path.stat().st_mtime for path in (base / folder).glob("*/metrics.jsonl")}
        files = sorted((path for path in ages if ages[path] >= since), key=ages.__getitem__)
        with suppress(UserError):  # there is no checkpoint
            tag = find_model_tag(base / folder)
            files.sort(key=lambda path: path.parent.name == tag)
        if files:
            found[stage] = read_metrics(files[-1])
    return found


# --- all plots of a report ---------------------------------------------------------------------------


def draw_all(
    base: Path,
    scores: Mapping[str, Mapping[str, float]],
    folder: Path,
    since: float = 0.0,
    intervals: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> list[tuple[str, str]]:
    """Draw every plot there is data for into folder; returns (file name, caption) in the report's order."""
    events = find_metrics(base, since)
    drawings = [
        ("scores.png", "Task scores by stage", score_figure(scores, intervals)),
        ("loss.png", "Training loss", loss_figure(events)),
        ("bpb.png", "Validation bits per byte", bpb_figure(events)),
        ("preferences.png", "Preferences on held-out pairs", preference_figure(events.get("dpo", []))),
        ("reward.png", "Reward in reinforcement learning", reward_figure(events.get("rl", []))),
        ("learning_rate.png", "Learning rate schedule", schedule_figure(events)),
        ("throughput.png", "Throughput", throughput_figure(events)),
    ]
    written = []
    for name, caption, figure in drawings:
        if figure is not None:
            save(figure, folder / name)
            written.append((name, caption))
    return written


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    from nanochat.common import whole_file

    with whole_file(path) as file, style():
        figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.2)


@contextmanager
def style() -> Iterator[None]:
    """Everything drawn inside has the look of the report; matplotlib's own settings stay as they were."""
    from matplotlib import rc_context

    with rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        yield


def new_figure(title: str, subtitle: str, panels: int, height: float = 3.3) -> tuple[Figure, list[Axes]]:
    """A figure without global state (no pyplot), its title at the top left, panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height))
    axes = [figure.add_subplot(1, panels, place + 1) for place in range(panels)]
    top = 1 - 1.0 / height
    figure.subplots_adjust(left=0.06, right=0.965, bottom=0.5 / height, top=top, wspace=0.24)
    figure.text(0.06, 1 - 0.12 / height, title, fontsize=14, fontweight="bold", va="top")
    figure.text(0.06, 1 - 0.4 / height, subtitle, fontsize=9.5, color=MUTED, va="top")
    return figure, axes


def _panels(
    events: Mapping[str, list[dict]], key: str, title: str, subtitle: str
) -> list[tuple[str, Axes, Curve]] | None:
    """One panel per stage that has at least two points of a key; None without any."""
    curves = {stage: curve(events[stage], key) for stage in STAGE_NAMES if stage in events}
    curves = {stage: c for stage, c in curves.items() if len(c.steps) > 1}
    if not curves:
        return None
    _, axes = new_figure(title, subtitle, len(curves))
    for axis, stage in zip(axes, curves, strict=True):
        axis.set_title(STAGE_NAMES[stage], color=COLORS[stage], pad=8)
        step_axis(axis, curves[stage].steps)
    return [(stage, axis, curves[stage]) for axis, stage in zip(axes, curves, strict=True)]


def step_axis(axis: Axes, steps: np.ndarray) -> None:
    """Optimizer steps from 0 to the last one, in thousands where they are many."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_xlim(0, steps[-1] * 1.02)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel("step", fontsize=9)


def _mark_end(axis: Axes, step: float, value: float, text: str, color: str) -> None:
    """A dot at the end of a line, and its value at the top right, where no line can cross it."""
    axis.plot([step], [value], "o", color=color, markersize=5, clip_on=False, zorder=5)
    axis.set_title(text, loc="right", color=color, pad=8)


# --- the plots ---------------------------------------------------------------------------------------


def loss_figure(events: Mapping[str, list[dict]]) -> Figure | None:
    """Training loss per stage: every logged value faint, the running mean strong."""
    events = {stage: found for stage, found in events.items() if stage in LANGUAGE_STAGES}
    with style():
        panels = _panels(
            events,
            "train/loss",
            "Training loss",
            "nats per supervised token; strong line: local mean",
        )
        for stage, axis, points in panels or []:
            mean = points.smoothed()
            axis.plot(points.steps, points.values, color=COLORS[stage], alpha=0.22, linewidth=1)
            axis.plot(points.steps, mean, color=COLORS[stage])
            low, high = float(points.values.min()), float(np.quantile(points.values, 0.995))
            axis.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low) + 1e-6)
            _mark_end(axis, points.steps[-1], mean[-1], f"{mean[-1]:.3f}", COLORS[stage])
    return panels[0][1].get_figure() if panels else None  # pyright: ignore[reportReturnType]


def bpb_figure(events: Mapping[str, list[dict]]) -> Figure | None:
    """Validation bits per byte per stage."""
    with style():
        panels = _panels(
            events, "val/bpb", "Validation bits per byte", "lower is better; independent of the tokenizer"
        )
        for stage, axis, points in panels or []:
            axis.plot(
                points.steps, points.values, color=COLORS[stage], marker="o", markersize=3.2, clip_on=False
            )
            axis.fill_between(
                points.steps, points.values, float(points.values.min()), color=COLORS[stage], alpha=0.08
            )
            _mark_end(axis, points.steps[-1], points.values[-1], f"{points.values[-1]:.3f}", COLORS[stage])
    return panels[0][1].get_figure() if panels else None  # pyright: ignore[reportReturnType]


def schedule_figure(events: Mapping[str, list[dict]]) -> Figure | None:
    """Learning rate multiplier per stage."""
    with style():
        panels = _panels(events, "train/lrm", "Learning rate", "multiplier of every group's initial rate")
        for stage, axis, points in panels or []:
            axis.plot(points.steps, points.values, color=COLORS[stage])
            axis.fill_between(points.steps, points.values, 0, color=COLORS[stage], alpha=0.12)
            axis.set_ylim(0, max(1.0, float(points.values.max())) * 1.08)
    return panels[0][1].get_figure() if panels else None  # pyright: ignore[reportReturnType]


def throughput_figure(events: Mapping[str, list[dict]]) -> Figure | None:
    """Tokens per second per stage, with the median and, where it is known, the share of the peak FLOPs."""
    from matplotlib.ticker import EngFormatter

    with style():
        panels = _panels(events, "train/tok_per_sec", "Throughput", "tokens per second; dashed: median")
        for stage, axis, points in panels or []:
            middle = float(np.median(points.values))
            axis.plot(points.steps, points.values, color=COLORS[stage], linewidth=1.2)
            axis.axhline(middle, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
            axis.set_ylim(0, float(points.values.max()) * 1.18)
            axis.yaxis.set_major_formatter(EngFormatter(sep=""))
            mfu = curve(events[stage], "train/mfu").values
            text = EngFormatter(places=1, sep="")(middle) + "/s"
            text += f", {np.median(mfu):.0f}% of peak" if len(mfu) else ""
            axis.text(0.99, 0.04, text, transform=axis.transAxes, ha="right", fontsize=9.5, fontweight="bold")
    return panels[0][1].get_figure() if panels else None  # pyright: ignore[reportReturnType]


def reward_figure(events: Sequence[Mapping]) -> Figure | None:
    """Mean reward of the rollouts, and pass@1 on held-out questions where it was evaluated."""
    reward, passed = curve(events, "reward"), curve(events, "pass@1")
    if len(reward.steps) < 2:
        return None
    with style():
        figure, (axis,) = new_figure(
            "Reinforcement learning",
            "share of correct answers, in rollouts and on held-out questions",
            1,
        )
        mean = reward.smoothed()
        axis.plot(reward.steps, reward.values, color=COLORS["rl"], alpha=0.25, linewidth=1)
        axis.plot(reward.steps, mean, color=COLORS["rl"], label="reward of rollouts, local mean")
        if len(passed.steps):
            axis.plot(
                passed.steps, passed.values, "D--", color=INK, linewidth=1, markersize=5, clip_on=False,
                label="pass@1, held out",
            )  # fmt: skip
        step_axis(axis, reward.steps)
        top = max(float(reward.values.max()), float(passed.values.max()) if len(passed.steps) else 0)
        axis.set_ylim(0, min(1.05, max(0.1, top * 1.15)))
        _mark_end(axis, reward.steps[-1], mean[-1], f"{mean[-1]:.1%}", COLORS["rl"])
        axis.legend(frameon=False, loc="lower right", fontsize=9)
    return figure


def preference_figure(events: Sequence[Mapping]) -> Figure | None:
    """On held-out pairs: the rewards of both answers, and how often the chosen one's is higher."""
    rewards = {side: curve(events, f"val/reward_{side}") for side in ("chosen", "rejected")}
    accuracy = curve(events, "val/accuracy")
    if len(accuracy.steps) < 2:
        return None
    with style():
        figure, (left, right) = new_figure(
            "Preferences",
            "on held-out pairs; reward: beta x change of an answer's log-probability since the source model",
            2,
        )
        for (side, points), color in zip(rewards.items(), (COLORS["dpo"], MUTED), strict=True):
            label = f"{side} ({points.values[-1]:+.2f})"
            left.plot(points.steps, points.values, color=color, marker="o", markersize=3.2, label=label)
        left.set_title("Reward of the answers", pad=8)
        left.legend(frameon=False, loc="best", fontsize=9)
        right.plot(accuracy.steps, accuracy.values, color=COLORS["dpo"], marker="o", markersize=3.2)
        _mark_end(right, accuracy.steps[-1], accuracy.values[-1], f"{accuracy.values[-1]:.0%}", COLORS["dpo"])
        right.axhline(0.5, color=MUTED, linestyle=(0, (4, 3)), linewidth=1)
        right.set_title("Share ranked rightly (dashed: chance)", pad=8)
        right.set_ylim(0, 1.08)
        for axis in (left, right):
            step_axis(axis, accuracy.steps)
    return figure


def score_figure(
    scores: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> Figure | None:
    """Accuracy of each task after each stage as bars with 95 % intervals; the score of guessing is dashed."""
    tasks = [task for task in TASKS if task in scores]
    stages = [stage for stage in STAGE_NAMES if any(stage in scores[task] for task in tasks)]
    if not tasks:
        return None
    with style():
        figure, (axis,) = new_figure(
            "What the model can do",
            "accuracy on held-out questions after each stage; whiskers: 95 % interval; dashed: guessing",
            1,
            3.9,
        )
        width = 0.8 / len(stages)
        for place, task in enumerate(tasks):
            present = [stage for stage in stages if stage in scores[task]]
            for index, stage in enumerate(present):
                left = place + (index - len(present) / 2 + 0.5) * width
                value = scores[task][stage]
                axis.bar(left, value, width * 0.9, color=COLORS[stage])
                low, high = (intervals or {}).get(task, {}).get(stage, (value, value))
                if low < high:
                    axis.plot([left, left], [low, high], color=INK, alpha=0.45, linewidth=1.3)
                axis.text(
                    left, max(value, high) + 0.012, f"{100 * value:.0f}", ha="center", fontsize=8.5, fontweight="bold",
                    color=COLORS[stage],
                )  # fmt: skip
            if CHANCE[task]:
                axis.hlines(
                    CHANCE[task], place - 0.44, place + 0.44, color=INK, linewidth=1.5,
                    linestyle=(0, (2, 1.2)), zorder=4,
                )  # fmt: skip
        _score_axis(axis, tasks, stages, max(max(scores[task].values()) for task in tasks))
    return figure


def _score_axis(axis: Axes, tasks: Sequence[str], stages: Sequence[str], highest: float) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import PercentFormatter

    axis.set_xticks(range(len(tasks)), tasks, fontsize=10, color=INK)
    axis.set_xlim(-0.6, len(tasks) - 0.4)
    axis.set_ylim(0, min(1.0, max(0.4, highest * 1.1)) + 0.06)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.legend(
        handles=[Patch(color=COLORS[stage], label=STAGE_NAMES[stage]) for stage in stages], frameon=False,
        ncols=len(stages), loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=9, handlelength=1,
        handleheight=1, columnspacing=1.2,
    )  # fmt: skip


def compression_figure(ratios: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bytes per token of each tokenizer by kind of text: {tokenizer: {text: ratio}}, the first one stressed."""
    texts = list(next(iter(ratios.values())))
    shades = [COLORS["base"], "#9fb3c8", "#d3dae1"]
    with style():
        figure, (axis,) = new_figure(
            "Compression", "bytes per token by kind of text; higher is better", 1, 3.6
        )
        width = 0.8 / len(ratios)
        for index, (name, by_text) in enumerate(ratios.items()):
            places = np.arange(len(texts)) + (index - len(ratios) / 2 + 0.5) * width
            values = [by_text[text] for text in texts]
            axis.bar(places, values, width * 0.9, color=shades[index % len(shades)], label=name)
            for place, value in zip(places, values, strict=True):
                axis.text(place, value, f"{value:.1f}", ha="center", va="bottom", fontsize=8, color=MUTED)
        axis.set_xticks(range(len(texts)), texts, color=INK)
        axis.legend(
            frameon=False, ncols=len(ratios), loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=9
        )
    return figure
