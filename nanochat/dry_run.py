"""What --dry-run of pretraining prints: sizes, horizon, memory by kind, expected time and cost; nothing is allocated.

The expected time is also said before a run whose first step would otherwise be the first to tell, much later.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nanochat.common import device_name, print0, synchronize
from nanochat.memory import Memory, Setting, training_memory
from nanochat.metrics import duration
from nanochat.network_config import GPTConfig
from nanochat.scaling import Horizon, accumulation_steps
from nanochat.sizing import flops_per_token, parameters

if TYPE_CHECKING:
    import torch

# Of what a large plain matrix product reaches on the same device (LOG 2026-11-25). A guess on GPUs: 52 % MFU on an H100.
_STEP_SHARE = {"cuda": 0.65, "cpu": 0.5}
SLOW_STEP_S = 10.0
_KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "update")


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows per micro-batch and rank with the memory that they are expected to take."""

    rows: int
    accumulation: int
    recompute: bool
    memory: Memory


def fitting_batch(
    config: GPTConfig, setting: Setting, total_batch_size: int, candidates: Sequence[int], limit: float
) -> Batch:
    """The largest of the candidates that is expected to fit, with activations computed again only where nothing else
    fits; the smallest of them if nothing does."""
    tries = [
        replace(setting, rows=rows, recompute=recompute)
        for recompute in sorted({setting.recompute, True})
        for rows in sorted(candidates, reverse=True)
    ]
    batches = [_batch(config, one, total_batch_size) for one in tries]
    return next((batch for batch in batches if batch.memory.peak <= limit), batches[-1])


def _batch(config: GPTConfig, setting: Setting, total_batch_size: int) -> Batch:
    steps = accumulation_steps(total_batch_size, setting.rows, config.sequence_len, setting.world_size)
    memory = training_memory(config, replace(setting, accumulation=steps))
    return Batch(setting.rows, steps, setting.recompute, memory)


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here, the best of a few."""
    import torch

    side = 8192 if device.type == "cuda" else 1024
    a = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        torch.matmul(a, a)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def training_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that training is expected to reach here on one device or rank, measured with a plain matrix product."""
    return _STEP_SHARE.get(device.type, 0.5) * product_speed(device, dtype)


def announce_time(
    config: GPTConfig,
    horizon: Horizon,
    steps_done: int,
    world_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Say how long steps and run will take on a CPU where that is long; a GPU's memory is not touched for it."""
    if device.type != "cpu":
        return
    per_step = (
        flops_per_token(config) * horizon.total_batch_size / (training_speed(device, dtype) * world_size)
    )
    if per_step > SLOW_STEP_S:
        left = duration(per_step * (horizon.num_steps - steps_done))
        print0(f"time: about {duration(per_step)} a step and {left} in all, an estimate without evaluations")


def describe(
    config: GPTConfig, horizon: Horizon, batch: Batch, world_size: int, device: torch.device, dtype: torch.dtype,
    limit: float,
) -> None:  # fmt: skip
    """Print everything. limit: bytes that this process could use."""
    from nanochat.environment import gpus, hourly_usd

    for name, count in parameters(config).items():
        print0(f"  {name:<22} {count:>16,}")
    per_token = flops_per_token(config)
    flops = per_token * horizon.num_tokens
    print0(f"FLOPs: {per_token:.3e} per token, {flops:.3e} in all")
    factors = f"{batch.rows} rows x {config.sequence_len} tokens x {world_size} ranks x {batch.accumulation} accumulation"
    print0(f"batch: {horizon.total_batch_size:,} tokens = {factors}")
    print0(f"horizon: {horizon.num_steps:,} steps, {horizon.num_tokens:,} tokens (from {horizon.source})")
    print0("memory per rank, estimated:")
    for kind in _KINDS:
        note = {"update": "  (after the activations are gone)", "activations": _kept(batch)}.get(kind, "")
        print0(f"  {kind:<22} {getattr(batch.memory, kind) / 2**30:>10.2f} GiB{note}")
    verdict = "fits" if batch.memory.peak <= limit else "does NOT fit"
    print0(
        f"  {'peak':<22} {batch.memory.peak / 2**30:>10.2f} GiB, {verdict} the {limit / 2**30:.2f} GiB that are free"
    )
    # Holes, see keep_freed_memory: 1.2 to 2.6 times.
    if device.type == "cpu" and sys.platform.startswith("linux"):
        print0("  freed blocks are kept, which is faster: the process grows to about 1.7 times that")
    speed = training_speed(device, dtype)
    seconds = flops / (speed * world_size)
    print0(
        f"time: about {duration(seconds)} at {world_size * speed / 1e12:.3g} TFLOP/s"
        f" ({world_size * speed / per_token:,.0f} tok/s) on {world_size} x {device_name(device)}, evaluations left out"
    )
    found = gpus()[:1] * world_size if device.type == "cuda" else ()
    usd = hourly_usd(found)
    print0(
        "cost: no price is known without a GPU"
        if usd is None
        else f"cost: about ${usd * seconds / 3600:,.2f} at ${usd:.2f} an hour"
    )
    print0("dry run: nothing was trained or written")


def _kept(batch: Batch) -> str:
    return "  (computed again in the backward pass)" if batch.recompute else ""
