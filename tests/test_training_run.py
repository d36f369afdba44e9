"""A run that is killed at any instant and started again ends as if nothing had happened: real scripts, SIGKILL."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from tests.easy_reward import is_even
from tests.killing import (
    SHORT,
    difference,
    folder,
    interrupted_run,
    leftovers,
    outcome,
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


@pytest.mark.parametrize("stage", ["base_train", "chat_rl"])
def test_a_killed_run_ends_as_if_nothing_had_happened(chain, tmp_path, stage):
    base = copy_of(chain, tmp_path / "base", stage)
    hits, _ = interrupted_run(base, stage, kills=1, rng=random.Random(stage), kinds=(1,))
    assert hits == 1
    assert_equal(folder(base, stage), folder(chain, stage))
