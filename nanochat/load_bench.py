"""Requests that arrive at random, against the scheduler: how long each waits, and what all of them get.

A distribution is written as a word and numbers: `64`, `uniform:32:160`, `exponential:0.02` (its mean).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.requests import Request
from nanochat.roofline import percentile
from nanochat.sampling import SamplingParams


def distribution(text: str) -> Callable[[random.Random], float]:
    """A function that draws from the distribution that text names. Raises UserError for anything else."""
    kind, *numbers = text.split(":") if ":" in text else ("constant", text)
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if min(values, default=-1.0) >= 0 and all(map(math.isfinite, values)):
        if kind == "constant" and len(values) == 1:
            return lambda rng: values[0]
        if kind == "uniform" and len(values) == 2 and values[0] <= values[1]:
            return lambda rng: rng.uniform(*values)
        if kind == "exponential" and len(values) == 1:
            return lambda rng: rng.expovariate(1 / values[0]) if values[0] else 0.0
    raise UserError(f"{text!r} is no distribution; write 64, uniform:32:160 or exponential:0.02")


@dataclass(slots=True)
class Client:
    """One request of the load: when it comes (seconds), what it asks, and when its tokens came."""

    arrival: float
    prompt: list[int]
    params: SamplingParams
    token_times: list[float] = field(default_factory=list)

    @property
    def latency(self) -> float:
        return self.token_times[-1] - self.arrival

    @property
    def first(self) -> float:
        """Seconds from arrival to the first token."""
        return self.token_times[0] - self.arrival


def make_clients(
    count: int, gaps: str, prompt_lengths: str, new_lengths: str, params: SamplingParams, context: int,
    vocab_size: int, seed: int = 0,
) -> list[Client]:  # fmt: skip
    """Clients with random prompts; gaps are the seconds between arrivals. Lengths are kept within the context."""
    from dataclasses import replace

    rng = random.Random(seed)
    gap, prompt_length, new_length = map(distribution, (gaps, prompt_lengths, new_lengths))
    now, clients = 0.0, []
    for number in range(count):
        new = min(max(1, round(new_length(rng))), context - 1)
        length = min(max(1, round(prompt_length(rng))), context - new)
        own = replace(params, max_tokens=new, seed=number)
        clients.append(Client(now, rng.choices(range(vocab_size), k=length), own))
        now += gap(rng)
    return clients


def serve(engine: Engine, clients: list[Client], at_once: int) -> dict[str, float | int]:
    """Serve the clients, at most `at_once` of them together, and say how it went. Their times are filled in."""
    engine.prefixes.clear()
    for client in clients:
        client.token_times.clear()
    coming, owners, steps = clients[::-1], dict[Request, Client](), list[float]()
    begun = time.perf_counter()
    while coming or owners:
        now = time.perf_counter() - begun
        while coming and coming[-1].arrival <= now and len(owners) < at_once:
            client = coming.pop()
            owners[engine.submit(client.prompt, client.params)] = client
        if not owners:
            time.sleep(max(0.0, coming[-1].arrival - now))
            continue
        events = engine.step()
        now_after = time.perf_counter() - begun
        steps.append(now_after - now)
        for event in events:
            owners[event.request].token_times.append(now_after)
            if event.finish_reason:
                del owners[event.request]
    return _summary(clients, steps)


def _summary(clients: list[Client], steps: list[float]) -> dict[str, float | int]:
    firsts, latencies = [c.first for c in clients], [c.latency for c in clients]
    tokens = sum(len(c.token_times) for c in clients)
    seconds = max(c.token_times[-1] for c in clients)
    gaps = [b - a for c in clients for a, b in zip(c.token_times, c.token_times[1:], strict=False)]
    numbers: dict[str, float | int] = {"requests": len(clients), "new_tokens": tokens, "steps": len(steps)}
    numbers |= {"seconds": round(seconds, 4), "tok_per_sec": round(tokens / seconds, 1)}
    for name, values in (("ttft", firsts), ("latency", latencies), ("gap", gaps or [0.0])):
        numbers |= {f"{name}_p{p}_sec": round(percentile(values, p / 100), 6) for p in (50, 90, 99)}
    return numbers
