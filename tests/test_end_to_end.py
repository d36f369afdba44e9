"""Every stage through the real scripts, from an empty folder to an answer, in miniature."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.training import RL_FLAGS, ROOT

TRAINING = ["--compile=off", "--device-type=cpu"]
STAGES = [
    ("nanochat.tinyworld", ["--chars=400000"]),
    ("scripts.tok_train", ["--vocab-size=600"]),
    ("scripts.tok_eval", []),
    (
        "scripts.base_train",
        ["--depth=2", "--head-dim=32", "--max-seq-len=256", "--device-batch-size=8", "--total-batch-size=2048",
         "--num-iterations=20", "--eval-tokens=4096", "--core-metric-every=20", "--core-metric-max-per-task=4",
         "--sample-every=20", *TRAINING],
    ),
    ("scripts.base_eval", ["--max-per-task=4", "--split-tokens=4096", "--device-batch-size=4"]),
    ("scripts.mid_train", ["--num-iterations=8", "--eval-tokens=4096", "--simple-spelling-size=50", "--spelling-bee-size=50", *TRAINING]),
    (
        "scripts.chat_sft",
        ["--num-iterations=8", "--eval-tokens=4096", "--simple-spelling-size=50", "--spelling-bee-size=50",
         "--chatcore-max-cat=8", "--chatcore-max-sample=2", *TRAINING],
    ),
    ("scripts.chat_rl", [f"--{name.replace('_', '-')}={value}" for name, value in RL_FLAGS.items()]),
    ("scripts.chat_eval", ["-i", "rl", "-x", "4", "-m", "32"]),
    ("nanochat.report", ["generate"]),
]  # fmt: skip


def call(module: str, arguments: list[str], folder) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=folder, capture_output=True, text=True, timeout=200,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.timeout(600)
def test_from_nothing_to_an_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    assert call("nanochat.report", ["reset"], tmp_path).returncode == 0
    for module, arguments in STAGES:
        done = call(module, arguments, tmp_path)
        assert done.returncode == 0, f"{module} failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    for part in (
        "Tokenizer training",
        "Base model training",
        "Midtraining",
        "Chat SFT",
        "Chat RL",
        "chance",
        ".png",
    ):
        assert part in report, part
    answer = call("scripts.chat_cli", ["-p", "What is 27 + 58?", "--json", "--seed=1", "-m", "16"], tmp_path)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert json.loads(answer.stdout)
