"""The smallest real runs of the training scripts, for tests."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch

from nanochat.checkpoint_manager import Checkpoint, list_steps

ROOT = Path(__file__).parent.parent
BASE_FLAGS = {
    "depth": 2, "aspect_ratio": 16, "head_dim": 16, "max_seq_len": 64, "window_pattern": "SL", "device_batch_size": 2,
    "total_batch_size": 512, "num_iterations": 6, "eval_every": 3, "eval_tokens": 512, "core_metric_every": -1,
    "sample_every": -1, "compile": "off", "device_type": "cpu", "model_tag": "t",
}  # fmt: skip
CHAT_FLAGS = {
    "num_iterations": 4, "eval_every": 2, "eval_tokens": 512, "simple_spelling_size": 50, "spelling_bee_size": 50,
    "compile": "off", "device_type": "cpu",
}  # fmt: skip
RL_FLAGS = {
    "num_iterations": 2, "examples_per_step": 4, "num_samples": 4, "max_new_tokens": 8, "eval_every": 2,
    "eval_examples": 4, "eval_samples": 2, "device_type": "cpu",
}  # fmt: skip

DPO_FLAGS = {
    "num_iterations": 6, "pairs_per_step": 8, "device_batch_size": 4, "eval_every": 3, "compile": "off", "device_type": "cpu",
}  # fmt: skip


def run_here(stage: str, **changes) -> None:
    """Call a training script's main in this process."""
    import importlib

    module = importlib.import_module(f"scripts.{stage}")
    module.main(dataclasses.replace(module.Config(), **(defaults(stage) | changes)))


def defaults(stage: str) -> dict:
    if stage == "base_train":
        return dict(BASE_FLAGS)
    if stage == "chat_rl":
        return dict(RL_FLAGS)
    if stage == "chat_dpo":
        return dict(DPO_FLAGS)
    return dict(CHAT_FLAGS) | ({"chatcore_every": -1} if stage == "chat_sft" else {})


def command(stage: str, ranks: int = 1, **changes) -> list[str]:
    """The command line of a run in processes of its own."""
    flags = defaults(stage) | changes
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    launch = (
        ["-m"]
        if ranks == 1
        else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    )
    return [sys.executable, *launch, f"scripts.{stage}", *arguments]


def run_processes(stage: str, ranks: int = 1, **changes) -> str:
    """Run a stage with one or several ranks; returns its output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(stage, ranks, **changes),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{stage} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def weights(directory: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """The model of a checkpoint folder, by default the last one."""
    return Checkpoint.open(directory, list_steps(directory)[-1] if step is None else step).model_state("cpu")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)
