"""transformers, as a process beside us, generates what our engine does from the same weights."""

from __future__ import annotations

import random

import pytest

from nanochat.engine import SamplingParams
from nanochat.sweep_bench import NoTokenizer, bench_engine
from tests.toy_model import random_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_seeded_thread")


def test_two_hundred_prompts_greedy():
    from nanochat.interop.peer import TransformersPeer

    model = random_model("classic", sequence_len=256, n_layer=4, n_head=4, n_kv_head=2, n_embd=64)
    engine, rng = bench_engine(model, NoTokenizer(), 64), random.Random(0)
    groups = [[rng.choices(range(256), k=length) for _ in range(10)] for length in range(1, 200, 10)]
    prompts = [prompt for group in groups for prompt in group]
    assert len(prompts) == 200
    ours = engine.complete_many(prompts, SamplingParams(temperature=0, max_tokens=40))
    with TransformersPeer(model) as peer:
        theirs = [row for group in groups for row in peer.generate(group, 40, 0.0, None)[1]]
    assert [completion.tokens for completion in ours] == theirs
    assert all(len(row) == 40 for row in theirs)
    assert len({tuple(row) for row in theirs}) > 100  # it is not one answer for all
