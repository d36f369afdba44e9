"""Real runs of the training scripts that are killed at random instants, and what a run leaves, for comparison."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from nanochat.checkpoint_manager import Checkpoint, list_steps
from nanochat.common import read_json
from nanochat.metrics import read_metrics
from tests.training import ROOT, command

PATIENCE_S = 200
FOLDERS = {"base_train": "base", "mid_train": "mid", "chat_sft": "chatsft", "chat_rl": "chatrl"}
CLOCK = {
    "time", "train/dt", "train/tok_per_sec", "train/mfu", "train/memory_bytes", "total_training_time",
}  # fmt: skip
# Small, but with checkpoints and evaluations between which a run can be killed.
SHORT = {
    "base_train": {"num_iterations": 9, "save_every": 2, "eval_every": 4, "keep_last": 2},
    "mid_train": {"num_iterations": 7, "save_every": 2, "eval_every": 3, "source": "base"},
    "chat_sft": {"num_iterations": 7, "save_every": 2, "eval_every": 3, "source": "mid"},
    "chat_rl": {
        "num_iterations": 5, "save_every": 2, "keep_last": 0, "eval_every": 2, "source": "sft",
        "examples_per_step": 2, "max_new_tokens": 6, "matrix_lr": 0.2, "clip_norm": 1.0,
    },
}  # fmt: skip


def folder(base: Path, stage: str) -> Path:
    return base / f"{FOLDERS[stage]}_checkpoints" / "t"


def start(base: Path, stage: str, ranks: int = 1, **changes: Any) -> psutil.Popen:
    """The real script in processes of its own, in a session of their own."""
    module = "tests.easy_reward" if stage == "chat_rl" else f"scripts.{stage}"
    arguments = [
        module if argument == f"scripts.{stage}" else argument
        for argument in command(stage, ranks, **(SHORT[stage] | changes))
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NANOCHAT_BASE_DIR": str(base)}
    return psutil.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process: psutil.Popen, code: int = 0) -> str:
    """Wait for the end; the output."""
    try:
        output, _ = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise
    assert process.returncode == code, output[-4000:]
    return output


def kill_all(process: psutil.Popen) -> None:
    """SIGKILL to a process and all below it, as when the machine goes down."""
    for victim in [process, *process.children(recursive=True)]:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    process.communicate()


def kill_one(process: psutil.Popen) -> None:
    """SIGKILL to one rank; torchrun ends the others. With one rank, to that."""
    workers = [
        child for child in process.children(recursive=True) if "--num-iterations" in str(child.cmdline())
    ]
    (workers[-1] if workers else process).kill()
    process.communicate(timeout=PATIENCE_S)


def instants(rng: random.Random, directory: Path) -> list[Callable[[], bool]]:
    """Predicates that become true somewhere in the life of a run that starts now."""
    metrics = directory / "metrics.jsonl"

    def num_events() -> int:
        return len(read_metrics(metrics)) if metrics.exists() else 0

    events, saved = num_events() + rng.randrange(1, 4), rng.randrange(1, 3)
    deadline = time.monotonic() + rng.uniform(0.0, 3.0)

    def is_writing() -> bool:
        """A checkpoint that is not the first."""
        return len(list_steps(directory)) >= saved and any(directory.glob(".m*_*.tmp"))

    return [
        lambda: num_events() >= events,  # between two steps, or in the next one
        is_writing,
        lambda: time.monotonic() > deadline,  # while starting, at times later
    ]


def interrupted_run(
    base: Path,
    stage: str,
    ranks: int,
    kills: int,
    rng: random.Random,
    kinds: tuple[int, ...] = (2, 0, 1),
) -> tuple[int, str]:
    """Kill a run that often at random instants, then let it end; (kills that hit a living run, last output)."""
    directory, hits = folder(base, stage), 0
    for kill in range(kills):
        process = start(base, stage, ranks)
        is_due = instants(rng, directory)[kinds[kill % len(kinds)]]
        while process.poll() is None and not is_due():
            time.sleep(0.0005)
        if process.poll() is None:
            time.sleep(rng.uniform(0.0, 0.02))
            (kill_one if ranks > 1 and rng.random() < 0.4 else kill_all)(process)
            hits += 1
        else:
            finish(process)  # it was faster
    return hits, finish(start(base, stage, ranks))


def outcome(directory: Path) -> dict[str, Any]:
    """All that a run leaves, but what the clock decides: weights, optimizer, metrics, state of loop and data."""
    step = list_steps(directory)[-1]
    checkpoint = Checkpoint.open(directory, step)
    loop = {k: v for k, v in checkpoint.meta["loop_state"].items() if k != "total_training_time"}
    events = read_metrics(directory / "metrics.jsonl")
    return {
        "step": step,
        "steps": list_steps(directory),
        "weights": checkpoint.model_state("cpu"),
        "optimizer": checkpoint.optimizer_state(),
        "loop": loop,
        "data": checkpoint.meta["dataloader_state_dict"],
        "metrics": [{k: v for k, v in event.items() if k not in CLOCK} for event in events],
    }


def difference(ours: Any, theirs: Any, where: str = "") -> str | None:
    """Where two outcomes differ by as much as a bit; None if nowhere."""
    if isinstance(ours, torch.Tensor):
        return None if torch.equal(ours, theirs) else f"{where}: {(ours - theirs).abs().max()}"
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return f"{where}: {sorted(map(str, ours.keys() ^ theirs.keys()))}"
        found = (difference(ours[name], theirs[name], f"{where}/{name}") for name in ours)
        return next((text for text in found if text), None)
    if isinstance(ours, list | tuple) and len(ours) == len(theirs):
        found = (difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(ours, theirs, strict=True)))
        return next((text for text in found if text), None)
    return None if ours == theirs else f"{where}: {ours} instead of {theirs}"


def leftovers(directory: Path) -> list[str]:
    """Files that belong to no checkpoint, and half-written ones."""
    listed = {
        name
        for step in list_steps(directory)
        for name in read_json(directory / f"meta_{step:06d}.json")["files"]
    }
    tensors = {path.name for path in directory.glob("*.pt")}
    return sorted({path.name for path in directory.rglob(".*.tmp")} | (tensors - listed))
