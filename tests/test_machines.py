"""Presets for cards of every size, and the scripts for two cards and for several machines."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.configurator import parse
from nanochat.memory import training_bytes
from nanochat.network_config import GPTConfig
from nanochat.scaling import model_dimensions
from nanochat.sizing import ratio_horizon
from scripts.base_train import Config
from tests.training import BASE_FLAGS, ROOT, command, largest_difference, weights

PRESETS = {int(re.findall(r"\d+", path.stem)[0]): path for path in (ROOT / "runs" / "presets").glob("*.py")}


def test_there_is_a_preset_for_every_common_card():
    assert sorted(PRESETS) == [8, 12, 16, 24, 32, 48, 80]


@pytest.mark.parametrize("gigabytes", sorted(PRESETS))
def test_a_preset_fits_its_card_and_says_how_much_it_takes(gigabytes):
    path = PRESETS[gigabytes]
    cfg = parse(Config, [str(path)])
    config = GPTConfig.modern(sequence_len=cfg.max_seq_len, **model_dimensions(cfg.depth))
    rows = cfg.device_batch_size
    assert rows is not None
    estimate = training_bytes(config, rows, world_size=1)
    assert 0.6 * gigabytes * 1e9 < estimate < 0.92 * gigabytes * 1e9
    assert f"estimated peak {estimate / 1e9:.1f} GB" in path.read_text(encoding="utf-8")
    for ranks in (1, 2, 4, 8):
        assert (
            ratio_horizon(config, cfg.target_param_data_ratio).total_batch_size % (rows * 2048 * ranks) == 0
        )


def test_two_cards_are_two(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0", "NANOCHAT_BASE_DIR": str(tmp_path)}
    done = bash("dual_gpu.sh", environment=environment)
    assert done.returncode == 2 and "CUDA_VISIBLE_DEVICES=0 does not name two cards" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--depth=2"], ["scripts.base_train"]])
def test_several_machines_need_a_meeting_point(arguments):
    done = bash("multinode.sh", *arguments, environment={"PATH": os.environ["PATH"]})
    assert done.returncode == 2 and "NNODES=<machines> HEAD=<host:port>" in done.stderr


def bash(script: str, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = environment | {"SKIP_SETUP": "1", "UV_PROJECT_ENVIRONMENT": sys.prefix}
    return subprocess.run(
        ["bash", str(ROOT / "runs" / script), *arguments], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.slow
def test_two_machines_train_what_one_does(tiny_run):
    """Both machines are this one; they find each other through the rendezvous alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "NNODES": "2", "HEAD": head, "NPROC_PER_NODE": "1", "SKIP_SETUP": "1", "OMP_NUM_THREADS": "1",
        "UV_PROJECT_ENVIRONMENT": sys.prefix,
    }  # fmt: skip
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in (BASE_FLAGS | {"arch": "classic"}).items()
    ]
    together = ["bash", str(ROOT / "runs" / "multinode.sh"), "scripts.base_train", *flags, "--model-tag=two"]
    machines = [
        subprocess.Popen(
            together, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    try:
        outputs = [machine.communicate(timeout=240)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert sum("x 2 ranks x" in output for output in outputs) == 1
    subprocess.run(command("base_train", arch="classic"), cwd=ROOT, check=True, capture_output=True)
    base = Path(os.environ["NANOCHAT_BASE_DIR"]) / "base_checkpoints"
    assert largest_difference(weights(base / "t"), weights(base / "two")) < 2e-4
