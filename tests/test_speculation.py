"""Guessing ahead changes how many passes there are, and no token."""

from __future__ import annotations

import random

import pytest
import torch

from nanochat.engine import Engine, SamplingParams
from nanochat.speculation import guess
from tests.toy_model import ByteTokenizer, random_model, scripted

pytestmark = pytest.mark.usefixtures("one_seeded_thread")
TOKENIZER = ByteTokenizer()
GREEDY = SamplingParams(temperature=0)


def test_guesses_follow_the_latest_occurrence():
    assert guess([1, 2, 3, 4, 9, 1, 2, 3, 5, 7, 1, 2, 3], 3) == [5, 7, 1]
    assert guess([1, 2, 3, 4, 9, 8, 2, 3, 5, 1, 2, 3], 9) == [
        4,
        9,
        8,
        2,
        3,
        5,
        1,
        2,
        3,
    ]  # longer endings first
    assert guess([5, 5, 5, 5], 4) == [5]
    assert guess([1, 2, 3, 4], 4) == guess([], 4) == guess([1], 4) == guess([1, 2, 1, 2, 1, 2], 0) == []
    # 256 and 1 have equal bytes at other places
    assert guess([256, 1, 7, 256 << 8, 1 << 56, 256, 1], 1) == [7]
    for seed in range(50):
        text = random.Random(seed).choices(range(3), k=30)
        found = guess(text, 5)
        places = [i for n in (4, 3, 2) for i in range(29 - n, -1, -1) if text[i : i + n] == text[-n:]]
        lengths = [n for n in (4, 3, 2) for i in range(29 - n, -1, -1) if text[i : i + n] == text[-n:]]
        assert found == (text[places[0] + lengths[0] :][:5] if places else [])


def run(engine: Engine, prompt: list[int], params: SamplingParams) -> tuple:
    """Everything that a request ends with."""
    request = engine.submit(prompt, params)
    events = []
    while request.finish_reason is None:
        events += [(event.token, event.is_sampled, event.finish_reason) for event in engine.step()]
    assert [event[0] for event in events] == request.tokens
    return events, request.masks, request.tool_calls, request.ended_by_token


@pytest.mark.parametrize("architecture", ["classic", "modern"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_tokens_as_without(architecture, temperature):
    """Also for samples, with the same seeds: then the distribution is the same, too."""
    windows = dict(short_window_divisor=24, short_window_multiple=8)
    model = random_model(architecture, sequence_len=192, n_layer=3, **windows)
    with torch.no_grad():  # sure of itself, and so given to repetition
        model.lm_head.weight.mul_(3)
    plain = Engine(model, TOKENIZER, tools={}, chunk_tokens=32)
    engine = Engine(model, TOKENIZER, tools={}, chunk_tokens=32, speculate=6)
    for seed in range(8):
        prompt = random.Random(seed).choices(range(4), k=5 + 8 * seed) * 2
        params = SamplingParams(temperature, top_k=3, max_tokens=60, seed=seed)
        assert run(engine, prompt, params) == run(plain, prompt, params)
    assert 0 < engine._shared.num_right < engine._shared.num_guessed


def test_calls_and_ends_inside_a_guess():
    call = ["x", "<|python_start|>", "1+2", "<|python_end|>", "<|output_start|>", "3", "<|output_end|>"]
    answers = {"ab": [*call, *call, *call, "done"]}
    results, passes = [], []
    for speculate in (0, 8):
        model = scripted(answers)
        results.append(run(Engine(model, TOKENIZER, speculate=speculate), TOKENIZER.encode("ab"), GREEDY))
        passes.append(len(model.calls))
    assert results[0] == results[1] and results[0][2] == 3
    assert passes[1] < passes[0]


def test_a_guess_stays_within_the_limit_and_lets_others_in():
    model = scripted({"ababab": ["ab" * 30]})
    engine = Engine(model, TOKENIZER, speculate=8)
    for limit in (1, 2, 3, 10):
        params = SamplingParams(temperature=0, max_tokens=limit)
        assert len(run(engine, TOKENIZER.encode("ababab"), params)[0]) == limit
    first = engine.submit(TOKENIZER.encode("ababab"), GREEDY)
    engine.step()
    second = engine.submit(TOKENIZER.encode("ababab"), GREEDY)
    while not engine._shared.is_idle:
        engine.step()
    assert first.tokens == second.tokens == [*TOKENIZER.encode("ab" * 30), first.tokens[-1]]


def test_penalties_are_not_guessed_over():
    model = random_model("classic")
    engine = Engine(model, TOKENIZER, tools={}, speculate=8)
    params = SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.3)
    expected = run(Engine(model, TOKENIZER, tools={}), [1, 2, 3] * 5, params)
    assert run(engine, [1, 2, 3] * 5, params) == expected
    assert engine._shared.num_guessed == 0
