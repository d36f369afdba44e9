"""Presets for cards of every size, and the script for two cards."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from nanochat.configurator import parse
from nanochat.sizing import Shape, ratio_horizon, training_bytes
from scripts.base_train import Config
from tests.training import ROOT

PRESETS = {int(re.findall(r"\d+", path.stem)[0]): path for path in (ROOT / "runs" / "presets").glob("*.py")}


def test_there_is_a_preset_for_every_common_card():
    assert sorted(PRESETS) == [8, 12, 16, 24, 32, 48, 80]


@pytest.mark.parametrize("gigabytes", sorted(PRESETS))
def test_a_preset_fits_its_card_and_says_how_much_it_takes(gigabytes):
    path = PRESETS[gigabytes]
    cfg = parse(Config, [str(path)])
    shape, rows = Shape(cfg.depth, sequence_len=cfg.max_seq_len), cfg.device_batch_size
    estimate = training_bytes(shape, rows, world_size=1)
    assert 0.6 * gigabytes * 1e9 < estimate < 0.92 * gigabytes * 1e9
    assert f"estimated peak {estimate / 1e9:.1f} GB" in path.read_text(encoding="utf-8")
    for ranks in (1, 2, 4, 8):
        assert ratio_horizon(shape, cfg.target_param_data_ratio).total_batch_size % (rows * 2048 * ranks) == 0


def test_two_cards_are_two(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0", "NANOCHAT_BASE_DIR": str(tmp_path)}
    done = bash("dual_gpu.sh", environment=environment)
    assert done.returncode == 2 and "CUDA_VISIBLE_DEVICES=0 does not name two cards" in done.stderr


def bash(script: str, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = environment | {"SKIP_SETUP": "1", "UV_PROJECT_ENVIRONMENT": sys.prefix}
    return subprocess.run(
        ["bash", str(ROOT / "runs" / script), *arguments], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
