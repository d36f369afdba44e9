"""The one training loop. Base, mid-training and SFT differ in data, schedule and evaluations, not here.

A step reads from top to bottom in `_train_step`: fetch the micro-batches, count their targets over all ranks,
add up gradients of (sum of losses / that count), set the schedule, update; then read the loss, which is the only
time that the step waits for the device. Because of the count, neither the
split into micro-batches nor the number of ranks nor the packing changes what a target weighs, and a
micro-batch without targets adds zero instead of NaN.
"""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from nanochat.checkpoint_manager import (
    Checkpoint,
    delete_checkpoints,
    host_copy,
    newest_good_step,
    refuse_irreplaceable,
    update_meta,
    write_checkpoint,
)
from nanochat.common import UserError, World, device_name, peak_flops, peak_memory_bytes, print0, synchronize
from nanochat.fp8 import without_float8
from nanochat.gpt import GPT
from nanochat.metrics import MetricsLog, StatusLine, Value, duration
from nanochat.optim import MuonAdamW
from nanochat.precision import first_loss_scale, next_loss_scale
from nanochat.schedule import Schedule
from nanochat.tokenizer import RustBPETokenizer

MAX_SKIPPED_IN_A_ROW = 20  # non-finite steps before the run gives up
UNTIMED_STEPS = 3  # the first steps compile and warm caches


class Loader(Protocol):
    """Iterator over (inputs, targets) whose state, saved after a batch, continues with the next one."""

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]: ...

    def state_dict(self) -> dict: ...

    @property
    def epoch(self) -> int: ...


@dataclass(frozen=True)
class Evaluation:
    """Something measured during training: every `every` steps and at the end; never if every <= 0."""

    every: int
    measure: Callable[[int], dict[str, Value]]
    at_start: bool = False

    def is_due(self, step: int, last_step: int) -> bool:
        if self.every <= 0:
            return False
        return step == last_step or (step % self.every == 0 and (step > 0 or self.at_start))


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


@dataclass(frozen=True)
class TrainingPlan:
    """What the loop needs besides model, optimizer and data."""

    stage: str
    directory: Path
    schedule: Schedule
    total_batch_size: int  # tokens per step over all ranks
    accumulation: int  # micro-batches per step and rank
    settings: dict  # the script's configuration, for checkpoint and log
    run: str = "dummy"
    project: str = "nanochat"
    evaluations: tuple[Evaluation, ...] = ()
    save_every: int = -1
    keep_last: int = 0
    compile: bool = False
    clip_norm: float = 0.0  # of the whole gradient; 0: as it is
    save: bool = True
    objective: Objective = field(default_factory=NextToken)
    extra_meta: dict = field(default_factory=dict)


@dataclass
class LoopState:
    """What the loop itself remembers; saved in every checkpoint."""

    step: int = 0
    smooth_loss: float = 0.0
    total_training_time: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0  # in a row, since a step was skipped
    results: dict[str, Value] = field(default_factory=dict)  # newest value of everything measured
    min_val_bpb: float = math.inf


def find_resume_point(directory: Path, world: World, resume: str) -> Checkpoint | None:
    """The checkpoint to continue from, or None to start from scratch. All ranks agree.

    resume: "auto" for the newest whole checkpoint in the folder, "never", or a step. "never" deletes what an
    earlier run left in the folder, since its later steps would be taken for this run's.
    Raises UserError if the folder holds a model that no run made: it is neither continued nor deleted.
    """
    refuse_irreplaceable(directory)
    step = -1
    if world.is_main:
        if resume == "auto":
            newest = newest_good_step(directory)
            step = -1 if newest is None else newest
        elif resume == "never":
            delete_checkpoints(directory)
        elif resume.isdigit():
            step = int(resume)
        else:
            raise UserError(f"--resume={resume} is not understood; use auto, never or a step")
    if world.size > 1:
        step = int(world.max(torch.tensor([step], device=world.device)))
    return None if step < 0 else Checkpoint.open(directory, step)


def train(
    plan: TrainingPlan,
    world: World,
    model: GPT,
    tokenizer: RustBPETokenizer,
    optimizer: MuonAdamW,
    make_loader: Callable[[dict | None], Loader],
    resume_from: Checkpoint | None = None,
) -> LoopState:
    """Train until the schedule ends; save, then evaluate, as often as the plan says. Returns the last state.

    make_loader: builds the data loader from a saved state or from None.
    SIGTERM and Ctrl-C finish the running step, save, and raise KeyboardInterrupt.
    """
    state, loader_state = LoopState(loss_scale=first_loss_scale(model.compute_dtype)), None
    if resume_from is not None:
        state, loader_state = _restore(resume_from, plan, optimizer)
        print0(f"resuming {plan.stage} at step {state.step} from {resume_from.directory}")
    loader = make_loader(loader_state)
    forward = torch.compile(model, dynamic=False) if plan.compile else model
    loop = _Loop(plan, world, model, tokenizer, optimizer, loader, forward, state)
    log = MetricsLog(
        plan.directory,
        is_main=world.is_main,
        resume_step=state.step if resume_from else None,
        project=plan.project,
        run=plan.run,
        config=plan.settings,
    )
    try:
        with log, graceful_stop() as stop, loop.writer:
            loop.run(log, stop)
            loop.wait_for_files()
    finally:
        gc.unfreeze()
        gc.enable()
    return state


def _restore(checkpoint: Checkpoint, plan: TrainingPlan, optimizer: MuonAdamW) -> tuple[LoopState, dict]:
    wanted = {"num_steps": plan.schedule.num_steps, "total_batch_size": plan.total_batch_size}
    for name, value in wanted.items():
        if checkpoint.meta.get(name) != value:
            raise UserError(
                f"{checkpoint.directory} holds a run with {name} {checkpoint.meta.get(name)}, not {value};"
                " use its settings, another folder (--model-tag or --output-tag), or --resume=never to start over"
            )
    optimizer_state = checkpoint.optimizer_state()
    if optimizer_state is None:
        raise UserError(f"{checkpoint.directory} has no optimizer state to resume from; use --resume=never")
    optimizer.load_full_state_dict(optimizer_state)
    saved = checkpoint.meta["loop_state"]
    saved["min_val_bpb"] = math.inf if saved["min_val_bpb"] is None else saved["min_val_bpb"]
    return LoopState(**saved), checkpoint.meta["dataloader_state_dict"]


@contextmanager
def graceful_stop() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of dying; a second signal of a kind acts as usual."""
    received: list[int] = []
    old = {}

    def remember(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, old[number])

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            old[number] = signal.signal(number, remember)
    except ValueError:  # not in the main thread: whoever embeds the loop handles signals
        old = {}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def stop_requested(received: list[int], world: World) -> bool:
    """Whether a signal has reached any rank."""
    if world.size == 1:
        return bool(received)
    return bool(world.max(torch.tensor([len(received)], device=world.device)))


@dataclass
class _Loop:
    plan: TrainingPlan
    world: World
    model: GPT
    tokenizer: RustBPETokenizer
    optimizer: MuonAdamW
    loader: Loader
    forward: Callable[..., torch.Tensor]
    state: LoopState

    def __post_init__(self) -> None:
        self.status = StatusLine(is_main=self.world.is_main)
        self.flops_per_token = self.model.estimate_flops()
        device = self.world.device
        self.peak = peak_flops(device_name(device)) if device.type == "cuda" else None
        self.first_step = self.state.step
        # Files are written while training goes on; leaving the `with` of the executor waits for the last one.
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None

    def run(self, log: MetricsLog, stop: list[int]) -> None:
        state, last_step = self.state, self.plan.schedule.num_steps
        while True:
            if self._save_due(last_step):
                self._save()  # before evaluating
            self._evaluate(log, last_step)
            if state.step >= last_step:
                self._save_results()
                return
            if stop_requested(stop, self.world):
                self._save()
                self.wait_for_files()
                raise KeyboardInterrupt
            self._timed_step(log)
            if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                self._give_up()

    def _save_due(self, last_step: int) -> bool:
        step, every = self.state.step, self.plan.save_every
        is_new = step > self.first_step
        return self.plan.save and is_new and (step == last_step or (every > 0 and step % every == 0))

    # --- one step --------------------------------------------------------------------------------

    def _timed_step(self, log: MetricsLog) -> None:
        state = self.state
        started = time.perf_counter()
        loss, norm = self._train_step()
        synchronize(self.world.device)
        seconds = time.perf_counter() - started
        state.step += 1
        if state.step - self.first_step > UNTIMED_STEPS:
            state.total_training_time += seconds
        if math.isfinite(loss):
            state.smooth_loss += 0.1 * (loss - state.smooth_loss) if state.step > 1 else loss
        self._report(log, loss, norm, seconds)
        _tame_garbage_collector(state.step - self.first_step)

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
        self.world.sum(total)
        self.plan.schedule.apply(self.optimizer, self.state.step)
        unusable = ~total.isfinite() | (count == 0)
        norm = self.optimizer.step(
            clip_norm=self.plan.clip_norm, skip=unusable, loss_scale=self.state.loss_scale
        )
        self.model.zero_grad(set_to_none=True)
        assert norm is not None
        loss, norm, targets = torch.stack([total, norm, count.float()]).tolist()
        self._note_usable(loss, norm, targets)
        return loss, norm

    def _note_usable(self, loss: float, norm: float, targets: float) -> None:
        """Count steps that the optimizer skipped, and say so; these are the same on all ranks."""
        state = self.state
        usable = math.isfinite(loss) and math.isfinite(norm) and targets > 0
        if usable:
            state.skipped_in_a_row, state.good_steps = 0, state.good_steps + 1
        else:
            state.skipped_in_a_row, state.good_steps = state.skipped_in_a_row + 1, 0
            state.skipped_steps += 1
            scaled = f" at loss scale {state.loss_scale:g}" if state.loss_scale != 1.0 else ""
            self.status.note(
                f"step {state.step}: loss {loss}, gradient norm {norm}{scaled}, {targets:.0f} targets; the step is skipped"
            )
        state.loss_scale = next_loss_scale(state.loss_scale, usable, state.good_steps)

    def _give_up(self) -> None:
        """The weights are still good, because no skipped step has touched them; they are saved."""
        if self.plan.save:
            self._save()
            self.wait_for_files()
        raise UserError(
            f"{MAX_SKIPPED_IN_A_ROW} steps in a row gave no usable loss or gradient; the state is saved in"
            f" {self.plan.directory}. Lower the learning rates, raise --warmup-steps or set --clip-norm=1, and"
            " start over with --resume=never"
        )

    def _report(self, log: MetricsLog, loss: float, norm: float, seconds: float) -> None:
        plan, state = self.plan, self.state
        last_step, tokens = plan.schedule.num_steps, plan.total_batch_size
        speed = tokens / seconds
        mfu = (
            None if self.peak is None else 100 * self.flops_per_token * speed / (self.peak * self.world.size)
        )
        multiplier = plan.schedule.lr_multiplier(state.step - 1)
        lr = self.optimizer.param_groups[-1]["lr"]
        memory = peak_memory_bytes(self.world.device)
        log.log(
            state.step,
            {
                "tokens": state.step * tokens,
                "train/loss": loss,
                "train/grad_norm": norm,
                "train/lrm": multiplier,
                "train/lr_matrix": lr,
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
        timed = max(state.step - self.first_step - UNTIMED_STEPS, 0)
        per_step = state.total_training_time / (state.step - UNTIMED_STEPS) if timed else seconds
        parts = [
            f"step {state.step:05d}/{last_step:05d} ({100 * state.step / last_step:.1f}%)",
            f"loss {state.smooth_loss:.4f}",
            f"lr {lr:.2e} (x{multiplier:.2f})",
            f"{1e3 * seconds:.0f} ms",
            f"{speed:,.0f} tok/s",
            *([f"mfu {mfu:.1f}%"] if mfu is not None else []),
            f"{memory / 2**30:.1f} GiB",
            f"epoch {self.loader.epoch}",
            f"{duration(per_step * (last_step - state.step))} left",
        ]
        self.status.show(" | ".join(parts), final=state.step == last_step)

    # --- around the steps ------------------------------------------------------------------------

    def _evaluate(self, log: MetricsLog, last_step: int) -> None:
        for evaluation in self.plan.evaluations:
            if not evaluation.is_due(self.state.step, last_step):
                continue
            self.model.eval()
            self.wait_for_files()  # an evaluation may fail or be killed; the model may not be lost
            with torch.no_grad(), without_float8(self.model):
                values = evaluation.measure(self.state.step)
            self.model.train()
            if isinstance(bpb := values.get("val/bpb"), float):
                self.state.min_val_bpb = min(self.state.min_val_bpb, bpb)
            self.state.results |= values
            if values:
                log.log(self.state.step, {"tokens": self.state.step * self.plan.total_batch_size, **values})
                shown = ", ".join(f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float))
                self.status.note(f"step {self.state.step:05d} | {shown}")

    def _save(self) -> None:
        """All ranks take part, because the optimizer state is spread over them; rank 0 writes, in the background."""
        plan, step, started = self.plan, self.state.step, time.perf_counter()
        optimizer_state = self.optimizer.full_state_dict()
        if not self.world.is_main:
            return
        self.wait_for_files()
        meta = {
            "stage": plan.stage,
            "num_steps": plan.schedule.num_steps,
            "user_config": plan.settings,
            "total_batch_size": plan.total_batch_size,
            "world_size": self.world.size,
            "dataloader_state_dict": self.loader.state_dict(),
            **deepcopy(self._results()),
            **plan.extra_meta,
        }
        write = partial(
            write_checkpoint, plan.directory, step, self.model.config, host_copy(self.model), meta, optimizer_state,
            self.tokenizer, plan.keep_last,
        )  # fmt: skip
        stall_ms = 1e3 * (time.perf_counter() - started)
        self.writing = self.writer.submit(self._write, write, step, stall_ms)

    def _write(self, write: Callable[[], None], step: int, stall_ms: float) -> None:
        started = time.perf_counter()
        write()
        seconds = time.perf_counter() - started
        self.status.note(
            f"saved step {step} in {self.plan.directory} (written in {seconds:.1f} s, training stood {stall_ms:.0f} ms)"
        )

    def wait_for_files(self) -> None:
        """Until the checkpoint in the making is on the disk. Raises what went wrong with it."""
        if self.writing is not None:
            self.writing.result()
            self.writing = None

    def _save_results(self) -> None:
        """Add what the last evaluations found to the last checkpoint."""
        self.wait_for_files()
        if self.world.is_main and self.plan.save:
            update_meta(self.plan.directory, self.state.step, self._results())

    def _results(self) -> dict:
        loop_state = dict(vars(self.state))
        if math.isinf(self.state.min_val_bpb):
            loop_state["min_val_bpb"] = None
        return {"val_bpb": self.state.results.get("val/bpb"), "loop_state": loop_state}


def _tame_garbage_collector(steps_done: int) -> None:
    """Python's collector stops the step for up to half a second; run it rarely instead of at will."""
    if steps_done == 1:
        gc.collect()
        gc.freeze()
        gc.disable()
    elif steps_done % 5000 == 0:
        gc.collect()
