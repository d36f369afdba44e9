"""Learning rate, momentum and weight decay as pure functions of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanochat.common import UserError

if TYPE_CHECKING:
    from nanochat.optim import MuonAdamW


@dataclass(frozen=True)
class Schedule:
    """Trapezoid: linear warm-up, constant, linear warm-down to `final_lr_frac` of the peak.

    Steps count from 0; `num_steps` is their number. Momentum and decay concern the Muon groups only.
    """

    num_steps: int
    warmup_steps: int = 0
    warmdown_steps: int = 0
    final_lr_frac: float = 0.0
    momentum_warmup_steps: int = 400
    momentum_start: float = 0.85
    momentum_peak: float = 0.97
    momentum_end: float = 0.97
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or not 0 <= self.warmdown_steps <= self.num_steps:
            raise UserError(
                f"a warm-up of {self.warmup_steps} steps and a warm-down of {self.warmdown_steps}"
                f" do not fit a run of {self.num_steps}"
            )

    def lr_multiplier(self, step: int) -> float:
        """In [0, 1] for every step, also beyond the last."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step <= self.num_steps - self.warmdown_steps or not self.warmdown_steps:
            return 1.0
        left = max(self.num_steps - step, 0) / self.warmdown_steps
        return left + (1 - left) * self.final_lr_frac

    def momentum(self, step: int) -> float:
        """Rises over the warm-up; falls from peak to end over the learning rate's warm-down."""
        if step < self.momentum_warmup_steps:
            progress = step / self.momentum_warmup_steps
            return self.momentum_start + (self.momentum_peak - self.momentum_start) * progress
        warmdown_start = self.num_steps - self.warmdown_steps
        if step < warmdown_start or not self.warmdown_steps:
            return self.momentum_peak
        progress = min((step - warmdown_start) / self.warmdown_steps, 1.0)
        return self.momentum_peak + (self.momentum_end - self.momentum_peak) * progress

    def decay(self, step: int) -> float:
        """Cosine from `weight_decay` to 0."""
        return self.weight_decay * 0.5 * (1 + math.cos(math.pi * min(step / self.num_steps, 1.0)))

    def apply(self, optimizer: MuonAdamW, step: int) -> None:
        """Set the hyper-parameters of one step on all groups."""
        multiplier = self.lr_multiplier(step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if group["kind"] == "muon":
                group["momentum"] = self.momentum(step)
                group["weight_decay"] = self.decay(step)

    def describe(self) -> str:
        """One line for the log: where the learning rate turns, so that a wrong direction is seen at once."""
        plateau = self.num_steps - self.warmdown_steps
        marks = sorted({0, min(self.warmup_steps, self.num_steps - 1), max(plateau, 0), self.num_steps - 1})
        points = ", ".join(f"{self.lr_multiplier(step):.3f} at step {step}" for step in marks)
        return f"learning rate multiplier: {points}"
