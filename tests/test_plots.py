"""Plots are drawn from what was measured: the right numbers, a picture that is not empty, no global state."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from nanochat import plots
from nanochat.plots import Curve, curve, draw_all, find_metrics

pytest.importorskip("matplotlib")


def write_events(base, stage_folder, events, tag="d4"):
    folder = base / stage_folder / tag
    folder.mkdir(parents=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def training(count=30):
    return [
        {
            "step": step,
            "train/loss": 8 * 0.9**step,
            "train/lrm": 1.0,
            "train/tok_per_sec": 1000,
            "train/mfu": None,
        }
        for step in range(count)
    ] + [{"step": step, "val/bpb": 2 - step / 30} for step in range(0, count, 10)]


def test_curve_takes_finite_values_in_order_and_the_later_of_repeated_steps():
    events = [{"step": 2, "x": 5.0}, {"step": 1, "x": 1.0}, {"step": 2, "x": 3.0}, {"step": 3, "x": None}]
    points = curve([*events, {"step": 4, "x": float("nan")}, {"step": 5, "y": 1}], "x")
    assert points.steps.tolist() == [1, 2]
    assert points.values.tolist() == [1.0, 3.0]


@pytest.mark.parametrize("count", [1, 2, 7, 100, 1001])
def test_smoothing_is_a_local_mean(count):
    values = np.random.default_rng(0).normal(size=count)
    smooth = Curve(np.arange(count), values).smoothed()
    radius = max(1, count // 40)
    for place in range(count):
        near = min(radius, place)
        assert smooth[place] == pytest.approx(values[place - near : place + near + 1].mean())


def test_smoothing_keeps_a_constant():
    assert Curve(np.arange(50), np.full(50, 3.0)).smoothed() == pytest.approx(np.full(50, 3.0))


def test_the_newest_metrics_of_each_stage_are_used_and_those_of_earlier_runs_not(tmp_path):
    old = write_events(tmp_path, "base_checkpoints", [{"step": 0, "train/loss": 1.0}], "old")
    new = write_events(tmp_path, "base_checkpoints", [{"step": 0, "train/loss": 2.0}], "new")
    stale = write_events(tmp_path, "mid_checkpoints", [{"step": 0, "train/loss": 3.0}])
    for path, age in ((old, 2000), (new, 3000), (stale, 1000)):
        os.utime(path, (age, age))
    assert find_metrics(tmp_path, since=1500) == {"base": [{"step": 0, "train/loss": 2.0}]}
    (old.parent / "meta_000009.json").write_text("{}")  # of the one with a checkpoint, however old
    assert find_metrics(tmp_path, since=1500) == {"base": [{"step": 0, "train/loss": 1.0}]}


def test_draw_all_draws_what_there_is(tmp_path):
    assert draw_all(tmp_path, {}, tmp_path / "out") == []
    write_events(tmp_path, "base_checkpoints", training())
    write_events(
        tmp_path, "chatrl_checkpoints", [{"step": s, "reward": s / 10, "pass@1": 0.5} for s in range(9)]
    )
    drawn = draw_all(tmp_path, {"MMLU": {"sft": 0.5}, "CORE": {"base": 0.1}}, tmp_path / "out")
    assert [name for name, _ in drawn] == [
        "scores.png", "loss.png", "bpb.png", "reward.png", "learning_rate.png", "throughput.png",
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(name for name, _ in drawn)


def test_pictures_are_large_and_not_blank(tmp_path):
    from matplotlib.image import imread

    write_events(tmp_path, "base_checkpoints", training())
    draw_all(tmp_path, {"MMLU": {"mid": 0.3, "sft": 0.5}}, tmp_path)
    for name in ("loss.png", "scores.png"):
        pixels = imread(tmp_path / name)[:, :, :3]
        assert pixels.shape[1] > 1200
        assert 0.005 < (pixels < 0.9).any(axis=2).mean() < 0.6


def test_bars_have_the_height_of_the_scores_and_chance_is_marked():
    figure = plots.score_figure({"MMLU": {"mid": 0.3, "sft": 0.5}, "GSM8K": {"sft": 0.25}})
    (axis,) = figure.axes
    assert sorted(bar.get_height() for bar in axis.patches) == [0.25, 0.3, 0.5]
    dashes = [line.get_segments()[0][0][1] for line in axis.collections]
    assert dashes == [0.25]  # MMLU; guessing scores nothing on GSM8K


def test_one_panel_per_stage_with_the_values_of_its_metrics():
    events = {"base": training(), "sft": training(12)}
    figure = plots.bpb_figure(events)
    assert [axis.get_title("left") for axis in figure.axes] == ["Pretraining", "Finetuning"]
    assert figure.axes[0].lines[0].get_ydata().tolist() == pytest.approx([2, 2 - 10 / 30, 2 - 20 / 30])


def test_drawing_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.loss_figure({"base": training()})
    assert dict(matplotlib.rcParams) == before


def test_a_diverged_run_still_has_a_picture():
    events = [{"step": s, "train/loss": float("nan") if s > 5 else 8.0} for s in range(10)]
    assert plots.loss_figure({"base": events}) is not None


def test_preferences_show_both_rewards_and_the_share_ranked_rightly():
    events = [
        {"step": s, "val/reward_chosen": s / 10, "val/reward_rejected": -s / 5, "val/accuracy": 0.5 + s / 50}
        for s in (0, 10, 20)
    ]
    figure = plots.preference_figure(events)
    left, right = figure.axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[0, 1, 2], [0, -2, -4]]
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "chosen (+2.00)",
        "rejected (-4.00)",
    ]
    assert right.lines[0].get_ydata().tolist() == pytest.approx([0.5, 0.7, 0.9])
    assert plots.preference_figure(events[:1]) is None


def test_compression_bars_have_the_height_of_the_ratios():
    figure = plots.compression_figure(
        {"ours": {"news": 3.5, "code": 2.0}, "GPT-2": {"news": 4.0, "code": 1.5}}
    )
    assert [bar.get_height() for bar in figure.axes[0].patches] == [3.5, 2.0, 4.0, 1.5]
