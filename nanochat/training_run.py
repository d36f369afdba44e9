"""A run around its steps, the same for every stage: resume, save in the background, evaluate, update, stop.

Base, mid-training, SFT and RL differ in what a step reads and computes (trainer.py, rl.py); everything that
keeps a run from being lost is here, once.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

from nanochat.checkpoint_manager import (
    Checkpoint,
    check_files,
    delete_checkpoints,
    newest_good_step,
    refuse_irreplaceable,
    remove_leftovers,
    update_meta,
    write_checkpoint,
)
from nanochat.common import UserError, World, exclusive, print0
from nanochat.fp8 import without_float8
from nanochat.gpt import GPT
from nanochat.metrics import MetricsLog, StatusLine, Value
from nanochat.optim import MuonAdamW
from nanochat.precision import first_loss_scale, next_loss_scale
from nanochat.schedule import Schedule
from nanochat.snapshot import Snapshot, place_for, weights_copy
from nanochat.tokenizer import RustBPETokenizer

MAX_SKIPPED_IN_A_ROW = 20  # non-finite updates before the run gives up
ECHO_S = 2.0  # a launcher passes on the signal that the terminal has sent to every process already
UNSAVED_S = 600.0  # after so long without a checkpoint one comes before an evaluation, which may fail


@dataclass(frozen=True)
class Evaluation:
    """Something measured during training: every `every` steps and at the end; never if every <= 0."""

    every: int
    measure: Callable[[], dict[str, Value]]
    at_start: bool = False

    def is_due(self, step: int, last_step: int) -> bool:
        if self.every <= 0:
            return False
        return step == last_step or (step % self.every == 0 and (step > 0 or self.at_start))


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run of any stage needs besides model, optimizer and data."""

    stage: str
    directory: Path
    schedule: Schedule
    settings: dict  # the script's configuration, for checkpoint and log
    run: str = "dummy"
    project: str = "nanochat"
    evaluations: tuple[Evaluation, ...] = ()
    save_every: int = -1
    keep_last: int = 0
    clip_norm: float = 0.0  # of the whole gradient; 0: as it is
    save: bool = True
    start_over: bool = False  # the checkpoints of an earlier run in the folder go, once this one begins
    extra_meta: dict = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Value]:
        """What a run cannot change when it goes on after an interruption."""
        return {"num_steps": self.schedule.num_steps}

    def progress(self, step: int) -> dict[str, Value]:
        """How far a step is, for the log, in what the stage counts besides steps."""
        return {}


@dataclass
class LoopState:
    """What the loop itself remembers; saved in every checkpoint."""

    step: int = 0
    smooth_loss: float = 0.0
    total_training_time: float = 0.0  # seconds, without steps that compiled
    timed_steps: int = 0  # in that time
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0  # in a row, since a step was skipped
    results: dict[str, Value] = field(default_factory=dict)  # newest value of everything measured
    min_val_bpb: float = math.inf


# --- resuming and stopping ---------------------------------------------------------------------------


def find_resume_point(directory: Path, world: World, resume: str) -> Checkpoint | None:
    """The checkpoint to continue from, or None to start from scratch. All ranks agree.

    resume: "auto" for the newest whole checkpoint in the folder, "never", or a step. Nothing is deleted here: much can
    still be wrong before the first step.
    Raises UserError if the folder holds a model that no run made (it is neither continued nor deleted), or if
    another run is at work in it.
    """
    refuse_irreplaceable(directory)
    step = -1
    if world.is_main:
        with exclusive(directory, wanted=directory.exists()):
            if resume == "auto":
                newest = newest_good_step(directory)
                step = -1 if newest is None else newest
            elif resume.isdigit():
                step = int(resume)
                if problem := check_files(directory, step):
                    raise UserError(f"--resume={resume} cannot be done: {problem}")
            elif resume != "never":
                raise UserError(f"--resume={resume} is not understood; use auto, never or a step")
    if world.size > 1:
        step = int(world.max(torch.tensor([step], device=world.device)))
    return None if step < 0 else Checkpoint.open(directory, step)


def changed_settings(before: dict, now: dict) -> list[str]:
    """`--name=value (was value)` for every setting that another value is given for, but for where to stop and save."""
    names = sorted(before.keys() & now.keys() - {"run", "resume", "save_every", "keep_last"})
    pairs = [(name, *(json.loads(json.dumps(values[name])) for values in (now, before))) for name in names]
    return [f"--{name.replace('_', '-')}={new} (was {old})" for name, new, old in pairs if new != old]


@dataclass
class Stop:
    """Signals to stop: when they came, and whether the next one may interrupt what is running."""

    received: list[float] = field(default_factory=list)
    at_once: bool = False

    def is_requested(self, world: World) -> bool:
        """Whether a signal has reached any rank."""
        if world.size == 1:
            return bool(self.received)
        return bool(world.max(torch.tensor([len(self.received)], device=world.device)))


@contextmanager
def graceful_stop() -> Iterator[Stop]:
    """Collect SIGTERM and SIGINT instead of dying; a second signal, ECHO_S later, acts as usual."""
    stop = Stop()
    old = {}

    def remember(number: int, frame: object) -> None:
        if stop.received and time.monotonic() - stop.received[0] > ECHO_S:
            signal.signal(number, old[number])
            signal.raise_signal(number)
        stop.received.append(time.monotonic())
        if len(stop.received) == 1 and not stop.at_once and os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")
        if stop.at_once:
            raise KeyboardInterrupt

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            old[number] = signal.signal(number, remember)
    except ValueError:  # not in the main thread: whoever embeds the loop handles signals
        old = {}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# --- the run -----------------------------------------------------------------------------------------


class TrainingRun:
    """One run from its start or its checkpoint to its end.

    state is what the loop remembers, data_state what the loader saved (None: it starts afresh).
    Raises UserError for a checkpoint of another run.
    """

    def __init__(
        self,
        plan: RunPlan,
        world: World,
        model: GPT,
        tokenizer: RustBPETokenizer,
        optimizer: MuonAdamW,
        resume_from: Checkpoint | None = None,
    ) -> None:
        self.plan, self.world, self.model = plan, world, model
        self.tokenizer, self.optimizer = tokenizer, optimizer
        self.state = LoopState(loss_scale=first_loss_scale(model.compute_dtype))
        self.data_state: dict | None = None
        self.is_resumed = resume_from is not None
        if resume_from is not None:
            self._restore(resume_from)
        self.first_step = self.state.step
        self._saved_step, self._saved_at = self.first_step, time.monotonic()
        self.status = StatusLine(is_main=world.is_main)
        # Files are written while training goes on; leaving the `with` of the executor waits for the last one.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._place: torch.device | None = None
        self._get_data_state: Callable[[], dict | None] = lambda: None

    def _restore(self, checkpoint: Checkpoint) -> None:
        meta, plan = checkpoint.meta, self.plan
        for name, value in plan.identity.items():
            if meta.get(name) != value:
                raise UserError(
                    f"{checkpoint.directory} holds a run with {name} {meta.get(name)}, not {value};"
                    " use its settings, another folder (--model-tag or --output-tag), or --resume=never to start over"
                )
        if not checkpoint.was_trained_with(self.tokenizer):
            raise UserError(
                f"{checkpoint.directory} holds a run with another tokenizer; use another folder (--model-tag or"
                " --output-tag), or --resume=never to start over"
            )
        optimizer_state = checkpoint.optimizer_state()
        if optimizer_state is None:
            raise UserError(
                f"{checkpoint.directory} has no optimizer state to resume from; use --resume=never"
            )
        self.optimizer.load_full_state_dict(optimizer_state)
        saved = dict(meta["loop_state"])
        saved["min_val_bpb"] = math.inf if saved["min_val_bpb"] is None else saved["min_val_bpb"]
        saved.setdefault("timed_steps", saved["step"])  # checkpoints until November 2026
        self.state, self.data_state = LoopState(**saved), meta["dataloader_state_dict"]
        print0(f"resuming {plan.stage} at step {self.state.step} from {checkpoint.directory}")
        changed = changed_settings(meta.get("user_config") or {}, plan.settings)
        if self.state.step >= plan.schedule.num_steps:
            print0("  this run is finished; --resume=never starts over")
        if changed:
            print0(f"  settings that were others before: {', '.join(changed)}")
        now = {"world_size": self.world.size, "device_batch_size": plan.extra_meta.get("device_batch_size")}
        changes = [f"{name} {value} instead of {meta[name]}" for name, value in now.items()
                   if name in meta and meta[name] != value]  # fmt: skip
        if changes:
            print0(f"  {', '.join(changes)}: the same run up to rounding, no longer bit for bit")

    def go(self, step: Callable[[MetricsLog], None], data_state: Callable[[], dict | None]) -> None:
        """Step until the schedule ends; save, then evaluate, as often as the plan says.

        step: makes one optimizer step, see update, counts it in the state and logs it. data_state: what the loader
        needs to go on after the last batch. SIGTERM and Ctrl-C finish the running step, or where there is one rank
        leave the running evaluation, save, and raise KeyboardInterrupt.
        """
        plan, self._get_data_state = self.plan, data_state
        with exclusive(plan.directory, self.world.is_main):
            if self.world.is_main:
                remove_leftovers(plan.directory)
            log = MetricsLog(
                plan.directory,
                is_main=self.world.is_main,
                resume_step=self.state.step if self.is_resumed else None,
                project=plan.project,
                run=plan.run,
                config=plan.settings,
            )
            with log, graceful_stop() as stop, self._writer:
                self._loop(step, log, stop)
                self._wait_for_files()

    def _loop(self, step: Callable[[MetricsLog], None], log: MetricsLog, stop: Stop) -> None:
        state, last_step = self.state, self.plan.schedule.num_steps
        while True:
            if self._save_due(last_step):
                self._save()  # before evaluating
            if state.step < last_step and stop.is_requested(self.world):
                self._leave()
            self._evaluate(log, last_step, stop)
            if state.step >= last_step:
                self._save_results()
                return
            is_first = state.step == self.first_step
            step(log)
            if is_first:
                self._delete_other_runs()
            if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                self._give_up()

    def _delete_other_runs(self) -> None:
        """What an earlier run left after the first step of this one, else a later --resume=auto would go on with it.

        Only after that step, which is where compilers and memory fail: whoever mistypes a flag keeps the model that was there.
        """
        if self.world.is_main and (self.is_resumed or self.plan.start_over):
            delete_checkpoints(self.plan.directory, after=self.first_step if self.is_resumed else -1)

    def _leave(self) -> NoReturn:
        self._save_at_once()
        raise KeyboardInterrupt

    # --- updates -------------------------------------------------------------------------------------

    def update(self, loss: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
        """The optimizer step after the backward passes; returns loss per target and gradient norm, over all ranks.

        loss: 0-dim, this rank's part of the loss, which was multiplied by state.loss_scale for the backward pass;
        targets: 0-dim, their count over all ranks. Waits for the device, once.
        """
        self.world.sum(loss)
        self.plan.schedule.apply(self.optimizer, self.state.step)
        unusable = ~loss.isfinite() | (targets == 0)
        norm = self.optimizer.step(
            clip_norm=self.plan.clip_norm, skip=unusable, loss_scale=self.state.loss_scale
        )
        self.model.zero_grad(set_to_none=True)
        numbers = torch.stack([loss, norm, targets.float()]).tolist()
        self._note_usable(*numbers)
        return numbers[0], numbers[1]

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
        self._save_at_once()
        raise UserError(
            f"{MAX_SKIPPED_IN_A_ROW} steps in a row gave no usable loss or gradient; the state is saved in"
            f" {self.plan.directory}. Lower the learning rates, warm up for longer or set --clip-norm=1, and"
            " start over with --resume=never"
        )

    # --- around the steps ----------------------------------------------------------------------------

    def _evaluate(self, log: MetricsLog, last_step: int, stop: Stop) -> None:
        for evaluation in self.plan.evaluations:
            if not evaluation.is_due(self.state.step, last_step):
                continue
            if self.state.step >= last_step:
                self._wait_for_files()  # what is killed from here on has lost nothing
            self.model.eval()
            try:
                # Of several ranks each would leave somewhere else, and wait for the others.
                stop.at_once = self.world.size == 1
                if stop.at_once and stop.received:
                    raise KeyboardInterrupt
                with torch.no_grad(), without_float8(self.model):
                    values = evaluation.measure()
            except KeyboardInterrupt:
                stop.at_once = False
                self._leave()
            finally:
                stop.at_once = False
                self.model.train()
            if isinstance(bpb := values.get("val/bpb"), float):
                self.state.min_val_bpb = min(self.state.min_val_bpb, bpb)
            self.state.results |= values
            if values:
                log.log(self.state.step, {**self.plan.progress(self.state.step), **values})
                shown = ", ".join(f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float))
                self.status.note(f"step {self.state.step:05d} | {shown}")

    def _save_due(self, last_step: int) -> bool:
        step, every = self.state.step, self.plan.save_every
        if not self.plan.save or step == self._saved_step:
            return False
        if step == last_step or (every > 0 and step % every == 0):
            return True
        if not any(evaluation.is_due(step, last_step) for evaluation in self.plan.evaluations):
            return False
        unsaved = torch.tensor([time.monotonic() - self._saved_at], device=self.world.device)
        return bool(self.world.max(unsaved) > UNSAVED_S)

    def _save(self) -> None:
        """All ranks take part, because the optimizer state is spread over them; rank 0 writes, in the background."""
        plan, step, started = self.plan, self.state.step, time.perf_counter()
        self._saved_step, self._saved_at = step, time.monotonic()
        # Decided once: afterwards the room for it is there, but counts as taken.
        self._place = place = self._place or place_for(self.model)
        optimizer_state = self.optimizer.full_state_dict(place)
        if not self.world.is_main:
            return
        self._wait_for_files()
        meta = {
            "stage": plan.stage,
            **plan.identity,
            "user_config": plan.settings,
            "world_size": self.world.size,
            "dataloader_state_dict": self._get_data_state(),
            **deepcopy(self._results()),
            **plan.extra_meta,
        }
        snapshot = Snapshot((weights_copy(self.model, place), optimizer_state), place)

        def write() -> None:
            weights, state = snapshot.on_host()
            write_checkpoint(
                plan.directory, step, self.model.config, weights, meta, state, self.tokenizer, plan.keep_last
            )

        stall_ms = 1e3 * (time.perf_counter() - started)
        self._writing = self._writer.submit(self._write, write, step, stall_ms)

    def _save_at_once(self) -> None:
        """Save before leaving. What is on the disk stays: whoever kills a run that stops too slowly could tear it."""
        if self.plan.save and self.state.step != self._saved_step:
            self._save()
        self._wait_for_files()

    def _write(self, write: Callable[[], None], step: int, stall_ms: float) -> None:
        started = time.perf_counter()
        write()
        seconds = time.perf_counter() - started
        self.status.note(
            f"saved step {step} in {self.plan.directory} (written in {seconds:.1f} s, training stood {stall_ms:.0f} ms)"
        )

    def _wait_for_files(self) -> None:
        """Until the checkpoint in the making is on the disk. Raises what went wrong with it."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _save_results(self) -> None:
        """Add what the last evaluations found to the last checkpoint."""
        self._wait_for_files()
        if self.world.is_main and self.plan.save:
            update_meta(self.plan.directory, self.state.step, self._results())

    def _results(self) -> dict:
        loop_state = dict(vars(self.state))
        if math.isinf(self.state.min_val_bpb):
            loop_state["min_val_bpb"] = None
        return {"val_bpb": self.state.results.get("val/bpb"), "loop_state": loop_state}
