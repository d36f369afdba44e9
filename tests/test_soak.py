"""An engine under random requests and cancels for a long time: nothing grows, leaks or is lost.

One minute by default; NANOCHAT_SOAK_S=600 for the ten minutes of a release.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from dataclasses import replace

import psutil
import pytest

from nanochat.calculator import use_calculator
from nanochat.engine import Engine, Request, SamplingParams
from nanochat.page_pool import PagePool
from nanochat.requests import SlowTool
from tests.toy_model import ByteTokenizer, check_pages, random_model

SOAK_S = float(os.environ.get("NANOCHAT_SOAK_S", "60"))
GROWTH_BYTES = 64 << 20  # of the process after its first tenth: allocators keep what they once had
MAX_LIVE = 40


def random_params(rng: random.Random) -> SamplingParams:
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.3]), max_tokens=rng.randrange(1, 60), seed=rng.randrange(99)
    )
    changes = [
        {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.2}, {"presence_penalty": 0.5},
        {"frequency_penalty": 0.3}, {"logit_bias": {65: 2.0}}, {"stop": ("a", "bc")}, {"stop_tokens": frozenset([7])},
        {"logprobs": 2},
    ]  # fmt: skip
    for change in rng.sample(changes, rng.randrange(4)):
        params = replace(params, **change)
    return params


@pytest.mark.slow
@pytest.mark.timeout(SOAK_S + 240)
def test_a_long_time_of_random_requests(one_seeded_thread):
    windows = dict(short_window_divisor=24, short_window_multiple=8)
    model = random_model("modern", sequence_len=192, n_layer=3, n_embd=32, **windows)
    tool = SlowTool(lambda text: time.sleep(0.002) or use_calculator(text) or "7")
    row_bytes = PagePool(model, 0, 32).bytes_for(192)
    engine = Engine(
        model, ByteTokenizer(), {"python": tool}, cache_bytes=3 * row_bytes, max_batch=12, chunk_tokens=32
    )
    scheduler, rng = engine._shared, random.Random(0)
    roots = [rng.choices(range(256), k=120) for _ in range(4)]
    live: dict[Request, int] = {}
    counts = {"submitted": 0, "cancelled": 0, "stop": 0, "length": 0}
    begun, settled_bytes = time.monotonic(), 0
    while (elapsed := time.monotonic() - begun) < SOAK_S or live:
        if elapsed < SOAK_S and len(live) < MAX_LIVE and rng.random() < 0.4:
            prompt = rng.choice(roots)[: rng.randrange(1, 121)] + rng.choices(range(265), k=rng.randrange(20))
            request = engine.submit(prompt, random_params(rng))
            live[request], counts["submitted"] = 0, counts["submitted"] + 1
        if live and rng.random() < 0.05:
            request = rng.choice(list(live))
            engine.cancel(request)
            counts["cancelled"] += 1
            del live[request]
        for event in engine.step():
            live[event.request] += event.token is not None
            if event.finish_reason:
                assert live.pop(event.request) == len(event.request.tokens) == len(event.request.masks)
                counts[event.finish_reason] += 1
        check_pages(scheduler.pool)
        if not settled_bytes and elapsed > SOAK_S / 10:
            settled_bytes = psutil.Process().memory_info().rss
    assert counts["submitted"] == counts["cancelled"] + counts["stop"] + counts["length"], counts
    assert scheduler.is_idle and not scheduler.cache.positions
    gc.collect()
    assert psutil.Process().memory_info().rss < settled_bytes + GROWTH_BYTES
    assert sum(isinstance(thing, Request) for thing in gc.get_objects()) <= scheduler.max_batch + 1
    assert threading.active_count() < 20
    print(
        counts, f"{scheduler.num_preemptions} preemptions, {scheduler.prefixes.tokens_reused} tokens reused"
    )
    assert scheduler.num_preemptions > 0 or counts["submitted"] < 200
