"""Bits per byte: a loss that does not depend on the vocabulary."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Protocol

import torch

from nanochat.common import World
from nanochat.metrics import StatusLine, duration
from nanochat.options import CPU_TOKENS

QUIET_S = 5.0  # shorter evaluations show no progress


class LossModel(Protocol):
    """A model that gives the loss of every position in nats, as a flat (B*T,) tensor."""

    def __call__(self, idx: torch.Tensor, targets: torch.Tensor, *, loss_reduction: str) -> torch.Tensor: ...


def tokens_by_default(usual: int, device: torch.device) -> int:
    """How many tokens to measure where nobody says: as usual, but on a CPU, where that takes hours, CPU_TOKENS."""
    return min(usual, CPU_TOKENS) if device.type == "cpu" else usual


@torch.no_grad()
def evaluate_bpb(
    model: LossModel,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    token_bytes: torch.Tensor,
    world: World,
) -> float:
    """Bits per byte of text over `steps` batches of every rank.

    token_bytes: integer (vocabulary,), bytes of text of each token, 0 for special tokens. Those and targets
    of -1 count neither as loss nor as length. Infinity if no byte was counted. Collective; rank 0 shows how far it is.
    """
    device = token_bytes.device
    # Sums of 10^7 losses need float64, which MPS does not have; there a batch is summed in float32.
    precise = torch.float32 if device.type == "mps" else torch.float64
    nats = torch.zeros((), dtype=torch.float64)
    total_bytes = torch.zeros((), dtype=torch.int64)
    status, started = StatusLine(every_seconds=30.0, is_main=world.is_main), time.monotonic()
    for step in range(1, steps + 1):
        inputs, targets = next(batches)
        losses = model(inputs, targets, loss_reduction="none").view(-1)
        targets = targets.view(-1)
        num_bytes = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
        # selected, not multiplied by 0 or 1: an infinite loss of an ignored target must not give NaN
        counted = torch.where(num_bytes > 0, losses, 0.0)
        nats += counted.sum(dtype=precise).cpu()
        total_bytes += num_bytes.sum().cpu()
        seconds = time.monotonic() - started
        if seconds > QUIET_S:
            left = f"{duration(seconds / step * (steps - step))} left"
            status.show(f"bits per byte: batch {step:,} of {steps:,} | {left}", final=step == steps)
    totals = world.sum(torch.stack([nats, total_bytes.double()]).to(device, precise)).tolist()
    return totals[0] / (math.log(2) * totals[1]) if totals[1] else math.inf
