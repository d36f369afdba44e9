"""The one training loop. Base, mid-training and SFT differ in data, schedule and evaluations, not here.

A step reads from top to bottom in `_train_step`: fetch the micro-batches, count their targets over all ranks,
add up gradients of (sum of losses / that count), set the schedule, update; then read the loss, which is the only
time that the step waits for the device. Because of the count, neither the
split into micro-batches nor the number of ranks nor the packing changes what a target weighs, and a
micro-batch without targets adds zero instead of NaN. What happens around the steps (saving, resuming, evaluating,
stopping) and the update itself are the same for RL, and in training_run.py.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from nanochat.checkpoint_manager import Checkpoint
from nanochat.common import World, device_name, peak_flops, peak_memory_bytes, print0, synchronize
from nanochat.gpt import GPT
from nanochat.metrics import MetricsLog, Value, duration
from nanochat.optim import MuonAdamW
from nanochat.tokenizer import RustBPETokenizer
from nanochat.training_run import LoopState, RunPlan, TrainingRun


class Loader(Protocol):
    """Iterator over (inputs, targets) whose state, saved after a batch, continues with the next one."""

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]: ...

    def state_dict(self) -> dict: ...

    @property
    def epoch(self) -> int: ...


L = TypeVar("L", bound=Loader)


class Objective(Protocol):
    """What a step minimises: a sum over units of the data, divided by their number over all ranks."""

    def count(self, targets: torch.Tensor, /) -> torch.Tensor: ...

    def loss(
        self, forward: Callable[..., torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor, /
    ) -> torch.Tensor: ...


class NextToken:
    """Cross entropy of the targets."""

    def count(self, targets: torch.Tensor) -> torch.Tensor:
        return (targets >= 0).sum()

    def loss(
        self, forward: Callable[..., torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        return forward(inputs, targets, loss_reduction="sum")


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(RunPlan):
    """What the loop needs besides model, optimizer and data."""

    total_batch_size: int  # tokens per step over all ranks
    accumulation: int  # micro-batches per step and rank
    compile: bool = False
    objective: Objective = field(default_factory=NextToken)

    @property
    def identity(self) -> dict[str, Value]:
        return {**super().identity, "total_batch_size": self.total_batch_size}

    def progress(self, step: int) -> dict[str, Value]:
        return {"tokens": step * self.total_batch_size}


def train(
    plan: TrainingPlan,
    world: World,
    model: GPT,
    tokenizer: RustBPETokenizer,
    optimizer: MuonAdamW,
    make_loader: Callable[..., L],
    resume_from: Checkpoint | None = None,
) -> tuple[LoopState, L]:
    """Train until the schedule ends; save, then evaluate, as often as the plan says. Returns last state and loader.

    make_loader: builds the data loader when called with state=, a saved one or None.
    SIGTERM and Ctrl-C finish the running step, save, and raise KeyboardInterrupt.
    """
    run = TrainingRun(plan, world, model, tokenizer, optimizer, resume_from)
    loader = make_loader(state=run.data_state)
    forward = torch.compile(model, dynamic=False) if plan.compile else model
    if plan.compile:
        print0("the first step compiles the network, which takes from half a minute to several")
    steps = _Steps(plan, run, loader, forward)
    try:
        run.go(steps.timed_step, loader.state_dict)
    finally:
        gc.unfreeze()
        gc.enable()
    return run.state, loader


class _Steps:
    def __init__(
        self, plan: TrainingPlan, run: TrainingRun, loader: Loader, forward: Callable[..., torch.Tensor]
    ) -> None:
        self.plan, self.run, self.loader, self.forward = plan, run, loader, forward
        self.world, self.state = run.world, run.state
        self.flops_per_token = run.model.estimate_flops()
        self.later_seconds = 0.0  # of the steps after the first, which compiles and warms caches
        device = self.world.device
        self.peak = peak_flops(device_name(device)) if device.type == "cuda" else None

    def timed_step(self, log: MetricsLog) -> None:
        state = self.state
        started = time.perf_counter()
        loss, norm = self._train_step()
        synchronize(self.world.device)
        seconds = time.perf_counter() - started
        state.step += 1
        is_first = state.step - self.run.first_step == 1
        if not (is_first and self.plan.compile):  # compiling, which every resumption repeats, is not training
            state.total_training_time += seconds
            state.timed_steps += 1
        if not is_first:
            self.later_seconds += seconds
        if math.isfinite(loss):
            state.smooth_loss += 0.1 * (loss - state.smooth_loss) if state.step > 1 else loss
        self._report(log, loss, norm, seconds)
        _tame_garbage_collector(state.step - self.run.first_step)

    def _train_step(self) -> tuple[float, float]:
        """One optimizer step; returns the loss per target and the norm of the gradient, over all ranks."""
        batches = [next(self.loader) for _ in range(self.plan.accumulation)]
        objective = self.plan.objective
        count = self.world.sum(torch.stack([objective.count(targets) for _, targets in batches]).sum())
        total = torch.zeros((), device=self.world.device)
        for inputs, targets in batches:
            loss = objective.loss(self.forward, inputs, targets) / count.clamp(min=1)
            (loss * self.state.loss_scale).backward()
            total += loss.detach()
        return self.run.update(total, count)

    def _report(self, log: MetricsLog, loss: float, norm: float, seconds: float) -> None:
        plan, state = self.plan, self.state
        last_step, tokens = plan.schedule.num_steps, plan.total_batch_size
        speed = tokens / seconds
        mfu = (
            None if self.peak is None else 100 * self.flops_per_token * speed / (self.peak * self.world.size)
        )
        multiplier = plan.schedule.lr_multiplier(state.step - 1)
        groups = self.run.optimizer.param_groups
        matrices = [group for group in groups if group["kind"] == "muon"]  # none where adapters learn alone
        lr = (matrices or groups)[0]["lr"]
        memory = peak_memory_bytes(self.world.device)
        log.log(
            state.step,
            {
                **plan.progress(state.step),
                "train/loss": loss,
                "train/grad_norm": norm,
                "train/lrm": multiplier,
                "train/lr_matrix" if matrices else "train/lr": lr,
                "train/dt": seconds,
                "train/tok_per_sec": speed,
                "train/mfu": mfu,
                "train/memory_bytes": memory,
                "train/epoch": self.loader.epoch,
                "total_training_time": state.total_training_time,
                "total_training_flops": self.flops_per_token * tokens * state.step,
            },
            kind="train",
        )
        parts = [
            f"step {state.step:05d}/{last_step:05d} ({100 * state.step / last_step:.1f}%)",
            f"loss {state.smooth_loss:.4f}",
            f"lr {lr:.2e} (x{multiplier:.2f})",
            f"{1e3 * seconds:.0f} ms",
            f"{speed:,.0f} tok/s",
            *([f"mfu {mfu:.1f}%"] if mfu is not None else []),
            f"{memory / 2**30:.1f} GiB",
            f"epoch {self.loader.epoch}",
            *self._time_left(seconds),
        ]
        self.run.status.show(" | ".join(parts), final=state.step == last_step)

    def _time_left(self, seconds: float) -> list[str]:
        """By the steps so far but the first; after that one by itself, and nothing is said where it compiled."""
        later = self.state.step - self.run.first_step - 1
        if later == 0 and self.plan.compile:
            return []
        per_step = self.later_seconds / later if later else seconds
        return [f"{duration(per_step * (self.plan.schedule.num_steps - self.state.step))} left"]


def _tame_garbage_collector(steps_done: int) -> None:
    """Python's collector stops the step for up to half a second; run it rarely instead of at will."""
    if steps_done == 1:
        gc.collect()
        gc.freeze()
        gc.disable()
    elif steps_done % 5000 == 0:
        gc.collect()
