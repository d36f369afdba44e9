"""Timed generations of one model over batch sizes: time to the first token, time per step, distance to the roofline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from nanochat.common import peak_memory_bytes, synchronize
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.roofline import ModelCost, percentile
from nanochat.sampling import SamplingParams

_PARAGRAPH = (
    "The harbour was quiet in the early morning. A single boat came in with the tide, and the people on the "
    "quay counted the crates that were carried ashore: apples, lamp oil, paper, nine sacks of flour. "
)


class NoTokenizer:
    """For models of random weights: a vocabulary without text, special tokens or an end."""

    def encode_special(self, text: str) -> int:
        raise KeyError(text)

    def get_bos_token_id(self) -> int:
        return -1

    def encode(self, text: str) -> list[int]:
        return []

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def english_prompt(tokenizer: Any, length: int) -> list[int]:
    """Exactly `length` tokens of plain text, <|bos|> first."""
    ids, paragraph = [tokenizer.get_bos_token_id()], tokenizer.encode(_PARAGRAPH)
    while len(ids) < length:
        ids += paragraph
    return ids[:length]


def bench_engine(model: GPT, tokenizer: Any, max_batch: int, **options: Any) -> Engine:
    """An engine without tools in which no token ends an answer, so that every run has the same steps."""
    engine = Engine(model, tokenizer, tools={}, max_batch=max_batch, **options)
    engine.toolbox.terminals = set()
    return engine


@dataclass(slots=True)
class Run:
    """One timed generation: seconds until every row had a token, of each step after that, and of all."""

    ttft: float
    steps: list[float]
    step_tokens: int
    total: float


def timed_run(engine: Engine, prompts: list[list[int]], params: SamplingParams, device: torch.device) -> Run:
    """Generate for all prompts together. Equal prompts are read once, and nothing is known from earlier runs."""
    engine.prefixes.clear()
    synchronize(device)
    begun = last = time.perf_counter()
    requests = {engine.submit(prompt, params) for prompt in prompts}
    started, ttft, steps, step_tokens = set(), 0.0, [], 0
    try:
        while any(request.finish_reason is None for request in requests):
            events = engine.step()  # whose tokens are here
            now = time.perf_counter()
            if len(started) < len(requests):
                started |= {event.request for event in events}
                ttft = now - begun
            else:
                steps.append(now - last)
                step_tokens += len(events)
            last = now
    finally:  # where memory ends, the next run must not find these
        for request in requests:
            engine.cancel(request)
    synchronize(device)
    return Run(ttft, steps, step_tokens, last - begun)


@dataclass(frozen=True, slots=True)
class Peaks:
    """What the hardware can do, per second: by its data sheet (None if unknown) and as measured in this run."""

    bandwidth: float | None
    flops: float | None
    measured_bandwidth: float


def prefill_entry(runs: list[Run], length: int, cost: ModelCost, peaks: Peaks) -> dict[str, Any]:
    """Medians of batch-1 prefills."""
    seconds = median(run.ttft for run in runs)
    entry: dict[str, Any] = {"prompt_tokens": length, "tok_per_sec": round(length / seconds, 1)}
    flops = cost.prefill_flops(length)
    share = None if peaks.flops is None else round(100 * flops / seconds / peaks.flops, 2)
    return entry | {"mfu_percent": share, "time_sec": round(seconds, 6)}


def sweep_entry(
    batch: int, runs: list[Run], context: int, cost: ModelCost, peaks: Peaks, peak_bytes: int
) -> dict[str, Any]:
    """Medians over repeats for one batch size, and percentiles over all their steps."""
    steps = [step for run in runs for step in run.steps]
    tpot = percentile(steps, 0.5)
    kv = batch * cost.kv_read_bytes(context)

    def share(amount: float, peak: float | None, digits: int) -> float | None:
        return None if peak is None else round(100 * amount / tpot / peak, digits)

    return {
        "batch_size": batch,
        "ttft_sec": round(median(run.ttft for run in runs), 6),
        "tpot_sec": round(tpot, 6),
        "tpot_p90_sec": round(percentile(steps, 0.9), 6),
        "tpot_p99_sec": round(percentile(steps, 0.99), 6),
        "tok_per_sec": round(median(run.step_tokens / sum(run.steps) for run in runs), 1),
        "total_sec": round(median(run.total for run in runs), 6),
        "mbu_percent": share(cost.weight_bytes + kv, peaks.bandwidth, 2),
        "mbu_effective_percent": share(cost.weight_bytes_read + kv, peaks.bandwidth, 2),
        "mbu_measured_percent": share(cost.weight_bytes_read + kv, peaks.measured_bandwidth, 2),
        "mfu_percent": share(batch * cost.decode_flops(context), peaks.flops, 4),
        "peak_vram_bytes": peak_bytes,
        "decode_steps": len(runs[0].steps),
    }


def run_or_oom(work: Callable[[], dict[str, Any]], batch: int) -> dict[str, Any]:
    """What work returns, or a note that memory ended, so that the sweep can go on."""
    try:
        return work()
    except (torch.OutOfMemoryError, MemoryError):
        torch.cuda.empty_cache() if torch.cuda.is_available() else None
        return {"batch_size": batch, "error": "oom"}


def memory_since(device: torch.device) -> Callable[[], int]:
    """Forget the peak so far where the device allows it; a function that says the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return lambda: peak_memory_bytes(device)
