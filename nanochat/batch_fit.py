"""--device-batch-size=auto: the micro-batch that trains fastest among those that fit, found by training on them.

Candidates are the numbers of rows that divide a rank's share of the batch, so accumulation keeps the total exact.
Each is tried with a forward and a backward pass, from small to large, until the next would not fit (memory grows
by the same amount per row) or is slower. Only if nothing fits are activations computed again instead of kept.
Trials run uncompiled, which takes a little more memory than compiled steps do. Nothing of them remains: no
random numbers are drawn, gradients are dropped, and the one optimizer step among them is told to change nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nanochat.common import UserError, World, peak_memory_bytes, print0, synchronize
from nanochat.machine import free_ram
from nanochat.scaling import accumulation_steps

if TYPE_CHECKING:
    from nanochat.gpt import GPT
    from nanochat.optim import MuonAdamW

MEMORY_SHARE = 0.92  # of what is free; the rest is fragmentation and what evaluations need on top
_GROWTH = 1.4  # from one candidate to the next at least
_SLOWER = 1.05  # a candidate that costs so much more per row than the best one ends the search
_AS_FAST = 1.02  # within measuring noise; then the larger one is taken


@dataclass(frozen=True, slots=True)
class Trial:
    """What a micro-batch of `rows` took: peak memory of the process, and seconds forward and backward."""

    rows: int
    bytes: float
    seconds: float

    @property
    def seconds_per_row(self) -> float:
        return self.seconds / self.rows


def candidates(rows_per_step: int) -> list[int]:
    """Divisors of the rows of a step, ascending, each well above the one before."""
    chosen = [1]
    for rows in range(2, rows_per_step + 1):
        if rows_per_step % rows == 0 and rows >= _GROWTH * chosen[-1]:
            chosen.append(rows)
    return chosen


def search(
    rows: Sequence[int], measure: Callable[[int], Trial | None], start_bytes: float, limit_bytes: float
) -> Iterator[Trial]:
    """Trials from small to large that fit. measure returns None where memory ran out."""
    done: list[Trial] = []
    for number in rows:
        if done and _predicted(done, number, start_bytes) > limit_bytes:
            return
        trial = measure(number)
        if trial is None or trial.bytes > limit_bytes:
            return
        yield trial
        done.append(trial)
        if trial.seconds_per_row > _SLOWER * min(one.seconds_per_row for one in done):
            return


def _predicted(done: Sequence[Trial], rows: int, start_bytes: float) -> float:
    """Bytes of a larger trial on the line through the last two, or through the first and the start."""
    last = done[-1]
    before = done[-2] if len(done) > 1 else Trial(0, start_bytes, 0.0)
    return last.bytes + (last.bytes - before.bytes) / (last.rows - before.rows) * (rows - last.rows)


def best(trials: Sequence[Trial]) -> Trial:
    """The largest of those that are as fast as the fastest."""
    fastest = min(trial.seconds_per_row for trial in trials)
    return max((t for t in trials if t.seconds_per_row <= _AS_FAST * fastest), key=lambda trial: trial.rows)


def fit_batch(model: GPT, optimizer: MuonAdamW, world: World, seq_len: int, total_batch_size: int) -> int:
    """Rows per micro-batch and rank; sets model.recompute where nothing fits without. Collective.

    Raises UserError if the total does not divide by ranks and tokens, or not even one row fits.
    """
    rows = candidates(accumulation_steps(total_batch_size, 1, seq_len, world.size))
    limit = -_largest(world, -MEMORY_SHARE * memory_for_this_process(world.device))
    for recompute in (False, True) if not model.recompute else (True,):
        model.recompute = recompute
        start = _largest(world, peak_memory_bytes(world.device))
        trials = []
        for trial in search(rows, lambda n: _measure(model, optimizer, world, seq_len, n), start, limit):
            speed = world.size * trial.rows * seq_len / trial.seconds
            print0(f"  tried {trial.rows} rows: {trial.bytes / 2**30:.2f} GiB, {speed:,.0f} tok/s uncompiled")
            trials.append(trial)
        _forget_trials(world.device)
        if trials:
            chosen = best(trials)
            kept = (
                "computed again in the backward pass, because nothing fits otherwise" if recompute else "kept"
            )
            print0(
                f"device batch size: {chosen.rows} rows (auto, of {limit / 2**30:.2f} GiB); activations {kept}"
            )
            return chosen.rows
    raise UserError(
        f"not even one row of {seq_len:,} tokens fits {limit / 2**30:.2f} GiB; lower --max-seq-len or --depth"
    )


def _measure(model: GPT, optimizer: MuonAdamW, world: World, seq_len: int, rows: int) -> Trial | None:
    """Two passes, of which the second finds gradients, as with accumulation; then a step that changes nothing."""
    device, seconds, failed = world.device, 0.0, 0.0
    ids = torch.arange(rows * seq_len, device=device).view(rows, seq_len) % model.config.vocab_size
    _forget_trials(device)
    try:
        for _ in range(2):
            started = time.perf_counter()
            model(ids, ids, loss_reduction="mean").backward()
            synchronize(device)
            seconds = time.perf_counter() - started
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        failed = 1.0
    failed, seconds = _largest(world, failed), _largest(world, seconds)
    if not failed and rows == 1:
        try:
            optimizer.step(skip=torch.ones((), dtype=torch.bool, device=device))
        except RuntimeError as error:
            if world.size > 1 or not _is_out_of_memory(error):  # the other ranks wait within the step
                raise
            failed = 1.0
    used = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory_bytes(device)
    model.zero_grad(set_to_none=True)
    return None if failed else Trial(rows, _largest(world, used), seconds)


def _forget_trials(device: torch.device) -> None:
    """Give back what trials left cached, and let the peak be that of what follows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return any(sign in str(error) for sign in ("memory", "ALLOC_FAILED"))  # the latter is cuBLAS's


def _largest(world: World, value: float) -> float:
    """Of all ranks, so that they decide alike."""
    return world.max(torch.tensor([value], dtype=torch.float32, device=world.device)).item()


# --- how much memory there is -----------------------------------------------------------------------


def memory_for_this_process(device: torch.device) -> float:
    """Bytes that this process holds or could still get, other processes on the machine taken into account."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return peak_memory_bytes(device) + free_ram() / processes
