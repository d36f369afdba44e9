"""A run that is killed at any instant and started again ends as if nothing had happened: real scripts, SIGKILL."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from nanochat.metrics import read_metrics
from tests.easy_reward import is_even
from tests.killing import (
    PATIENCE_S,
    SHORT,
    difference,
    finish,
    folder,
    interrupted_run,
    leftovers,
    outcome,
    start,
)
from tests.training import run_here

ENVIRONMENT = {"NANOCHAT_DATA": "tinyworld", "NANOCHAT_DTYPE": "float32"}
STAGES = ["base_train", "mid_train", "chat_sft", "chat_rl"]


def copy_of(base: Path, target: Path, without: str) -> Path:
    """A base folder without what a stage has made in it."""
    shutil.copytree(
        base, target, symlinks=True, ignore=shutil.ignore_patterns(folder(base, without).parent.name)
    )
    return target


@pytest.fixture(scope="module")
def chain(tiny_base, tmp_path_factory) -> Path:
    """Straight runs of all stages on one rank, each from the one before."""
    base = tmp_path_factory.mktemp("chain") / "base"
    base.mkdir()
    (base / "tinyworld").symlink_to(tiny_base / "tinyworld")
    shutil.copytree(tiny_base / "tokenizer", base / "tokenizer")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | {"NANOCHAT_BASE_DIR": str(base)}).items():
            patch.setenv(name, value)
        for name in ("reward", "evaluate"):
            patch.setattr(f"tasks.gsm8k.GSM8K.{name}", is_even)
        for stage in STAGES:
            run_here(stage, **SHORT[stage])
    return base


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def assert_equal(ours: Path, theirs: Path) -> None:
    found = difference(outcome(ours), outcome(theirs))
    assert found is None, found
    assert leftovers(ours) == []


@pytest.mark.parametrize("stage", ["base_train", pytest.param("chat_rl", marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_if_nothing_had_happened(chain, tmp_path, stage):
    base = copy_of(chain, tmp_path / "base", stage)
    hits, _ = interrupted_run(base, stage, ranks=1, kills=1, rng=random.Random(stage), kinds=(1,))
    assert hits == 1
    assert_equal(folder(base, stage), folder(chain, stage))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_three_kills_change_nothing(chain, tmp_path, stage, ranks):
    straight = folder(chain, stage)
    if ranks > 1:  # in another order of additions than one rank
        finish(start(copy_of(chain, tmp_path / "straight", stage), stage, ranks))
        straight = folder(tmp_path / "straight", stage)
    base = copy_of(chain, tmp_path / "base", stage)
    hits, output = interrupted_run(base, stage, ranks, kills=3, rng=random.Random(f"{stage}{ranks}"))
    assert hits == 3, output[-2000:]
    assert_equal(folder(base, stage), straight)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("stage", "ranks", "how"), [
    ("base_train", 2, "ctrl-c"), ("base_train", 2, "terminate"), ("chat_rl", 1, "ctrl-c"), ("chat_rl", 2, "terminate"),
])  # fmt: skip
def test_a_stopped_run_saves_and_goes_on(chain, tmp_path, stage, ranks, how):
    """Ctrl-C in a terminal reaches every process at once, and torchrun passes it on; kill reaches torchrun alone."""
    straight = copy_of(chain, tmp_path / "straight", stage)
    finish(start(straight, stage, ranks))
    base = copy_of(chain, tmp_path / "base", stage)
    process, metrics = start(base, stage, ranks), folder(base, stage) / "metrics.jsonl"
    while not metrics.exists() or len(read_metrics(metrics)) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0 and "saved step" in output, output
    assert "resuming" in finish(start(base, stage, ranks))
    ours, theirs = outcome(folder(base, stage)), outcome(folder(straight, stage))
    del ours["steps"], theirs["steps"]  # one more was saved
    found = difference(ours, theirs)
    assert found is None, found


@pytest.mark.slow
def test_ranks_that_outlive_their_torchrun_keep_the_folder_for_themselves(chain, tmp_path):
    base = copy_of(chain, tmp_path / "base", "base_train")
    process = start(base, "base_train", 2, num_iterations=100_000)
    ranks, metrics = [], folder(base, "base_train") / "metrics.jsonl"
    try:
        while not metrics.exists() or len(read_metrics(metrics)) < 2:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        ranks = process.children(recursive=True)
        process.kill()
        process.wait()
        again = start(base, "base_train", 1, num_iterations=100_000)
        output = finish(again, code=2)
        assert f"another run is at work in {folder(base, 'base_train')} (process" in output
    finally:
        for rank in ranks:
            rank.kill()
