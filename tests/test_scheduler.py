"""One text, many ways to compute it: chunks, company, preemption and remembered prefixes change nothing."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import flash_attention
from nanochat.calculator import use_calculator
from nanochat.engine import Completion, ContextOverflow, Engine, SamplingParams
from nanochat.gpt import GPT
from nanochat.page_pool import PAGE, PagePool
from nanochat.requests import SlowTool
from nanochat.row_cache import RowCache
from nanochat.scheduler import TOOL_WAIT_S
from tests.toy_model import ByteTokenizer, ScriptedModel, check_pages, random_model, scripted

torch.set_num_threads(1)
TOKENIZER = ByteTokenizer()
GREEDY = SamplingParams(temperature=0)
LENGTHS = [1, 2, 7, 31, 32, 33, 64, 65, 100, 150]  # around blocks, chunks and windows


# Four heads; as many, two or one of keys and values; windows or none.
SHAPES = {
    "classic": {}, "modern": {}, "classic, one key head, windows": dict(n_kv_head=1, window_pattern="SL"),
    "modern, four key heads": dict(n_kv_head=4), "modern, one key head, no window": dict(n_kv_head=1, window_pattern="L"),
}  # fmt: skip


@cache
def small_model(shape: str) -> GPT:
    """Two of three layers of the modern one see 8 tokens back, so that their rings have 64 slots of 192."""
    windows = dict(short_window_divisor=24, short_window_multiple=8)
    sizes = dict(sequence_len=192, n_layer=3, n_embd=32, **windows) | SHAPES[shape]
    return random_model(shape.partition(",")[0], **sizes)


def engine_for(model: GPT | ScriptedModel, rows: float = 1e6, **options) -> Engine:
    """An engine whose memory is enough for a number of rows of the full context."""
    row = PagePool(model, 0, options.get("chunk_tokens")).bytes_for(model.config.sequence_len)
    return Engine(model, TOKENIZER, cache_bytes=int(rows * row), **options)


def rows_bytes(engine: Engine) -> int:
    """What pages of running rows take, those included that are remembered."""
    pool = engine.prefixes.pool
    return sum(
        int(held.sum()) * group.page_bytes
        for held, group in zip(engine._shared.cache._held, pool.groups, strict=True)
    )


def run(engine: Engine, prompts: Sequence[Sequence[int]], each: Sequence[SamplingParams]) -> list:
    """Submit all and step to the end; (tokens, logprobs) of each, within the memory bound all the time."""
    requests = [engine.submit(prompt, params) for prompt, params in zip(prompts, each, strict=True)]
    scores: dict = {request: [] for request in requests}
    while not engine._shared.is_idle:
        for event in engine.step():
            scores[event.request].append(event.logprob)
        check_pages(engine.prefixes.pool)
    return [(request.tokens, scores[request]) for request in requests]


def check_against_full_forward(model: GPT, prompt: Sequence[int], tokens: list[int], scores: list) -> None:
    """Greedy tokens are the best of one forward pass over the whole text, scores within 1e-5 of it."""
    with torch.inference_mode():
        logits = model.forward(torch.tensor([[*prompt, *tokens[:-1]]]))[0, len(prompt) - 1 :]
    assert tokens == logits.argmax(-1).tolist()
    expected = logits.log_softmax(-1).amax(-1)
    assert torch.allclose(torch.tensor(scores), expected, rtol=0, atol=1e-5)


# --- exactness ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [pytest.param(shape, marks=pytest.mark.slow) if i > 2 else shape for i, shape in enumerate(SHAPES)],
)
def test_every_way_gives_the_tokens_of_the_full_forward(shape):
    model, rng = small_model(shape), random.Random(0)
    prompts = [rng.choices(range(256), k=length) for length in LENGTHS]
    each = [SamplingParams(temperature=0, max_tokens=rng.randrange(8, 40), logprobs=0) for _ in prompts]
    alone = [run(engine_for(model), [p], [e])[0] for p, e in zip(prompts, each, strict=True)]
    for prompt, (tokens, scores) in zip(prompts, alone, strict=True):
        check_against_full_forward(model, prompt, tokens, scores)

    def same(found: list) -> None:
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in alone]
        for (_, scores), (_, expected) in zip(found, alone, strict=True):
            assert scores == pytest.approx(expected, rel=0, abs=1e-5)

    same(run(engine_for(model), prompts, each))  # batched with strangers
    same(run(engine_for(model, chunk_tokens=16, max_batch=4), prompts, each))  # chunks
    tight = engine_for(model, rows=2.5, chunk_tokens=16)
    same(run(tight, prompts, each))
    assert tight._shared.num_preemptions > 0
    again = engine_for(model, chunk_tokens=16)
    run(again, prompts, each)
    assert again.prefixes.tokens_reused == 0
    same(run(again, prompts, each))
    assert again.prefixes.tokens_reused == sum((n - 1) // PAGE * PAGE for n in LENGTHS)


def test_seeded_samples_survive_preemption_and_company():
    model, rng = small_model("modern"), random.Random(3)
    prompts = [rng.choices(range(256), k=rng.randrange(1, 120)) for _ in range(9)]
    each = [SamplingParams(top_k=20, seed=i, max_tokens=30, repetition_penalty=1.1) for i in range(9)]
    alone = [Engine(model, TOKENIZER).complete_many([p], [s])[0] for p, s in zip(prompts, each, strict=True)]
    for rows in (1.2, 3):
        assert engine_for(model, rows, chunk_tokens=16).complete_many(prompts, each) == alone


@pytest.mark.parametrize("shape", SHAPES)
def test_the_other_attention_of_a_processor_agrees(shape, monkeypatch):
    """The full forward takes our kernel; without a compiler it takes torch's for long texts, as decoding does."""
    model, rng = small_model(shape), random.Random(1)
    prompt = rng.choices(range(256), k=100)
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=0)
    ((tokens, scores),) = run(engine_for(model), [prompt], [params])
    monkeypatch.setattr(flash_attention, "CPU_MATERIALISE_UP_TO", 0)
    monkeypatch.setattr(flash_attention, "_CHOSEN", {})
    monkeypatch.setenv("NANOCHAT_ATTN", "sdpa")
    check_against_full_forward(model, prompt, tokens, scores)


@settings(max_examples=3, derandomize=True, deadline=None)
@given(
    shape=st.sampled_from(list(SHAPES)),
    choices=st.lists(st.integers(0, 2**20), min_size=520, max_size=520),
    rows=st.sampled_from([1.4, 2.5, 4]),
    max_batch=st.sampled_from([2, 7]),
    ahead=st.booleans(),
)
def test_random_schedules(shape, choices, rows, max_batch, ahead):
    """520 events: submits (often of known beginnings), cancels, steps, and preemptions as memory demands."""
    model = small_model(shape)
    engine = engine_for(model, rows, chunk_tokens=16, max_batch=max_batch)
    engine._shared.run_ahead = ahead
    roots = [random.Random(i).choices(range(256), k=100) for i in range(3)]
    live: dict = {}
    for choice in choices:
        rng = random.Random(choice)
        if choice % 5 == 0 and len(live) < 12:
            prompt = rng.choice(roots)[: rng.randrange(1, 101)] + rng.choices(range(256), k=rng.randrange(30))
            live[engine.submit(prompt, replace(GREEDY, max_tokens=rng.randrange(1, 50), logprobs=0))] = []
        elif choice % 40 == 1 and live:
            request = rng.choice(list(live))
            engine.cancel(request)
            del live[request]
        else:
            for event in engine.step():
                live[event.request].append(event.logprob)
                if event.finish_reason:
                    scores = live.pop(event.request)
                    check_against_full_forward(model, event.request.prompt, event.request.tokens, scores)
            check_pages(engine.prefixes.pool)
    for request in list(live):
        engine.cancel(request)
    assert engine._shared.is_idle and engine.step() == [] and rows_bytes(engine) == 0


# --- joining, leaving, memory ------------------------------------------------------------------------


def test_a_long_prompt_does_not_stop_the_others():
    model = ScriptedModel(lambda history: 65)
    engine = Engine(model, TOKENIZER, chunk_tokens=8)
    talking = engine.submit([1, 2], SamplingParams(max_tokens=40))
    engine.step()
    newcomer = engine.submit([3] * 60, SamplingParams(max_tokens=1))
    for _ in range(8):
        model.calls.clear()
        events = engine.step()
        assert events[0].request is talking
        assert model.calls[0] == (1, 1) and all(width <= 8 for _, width in model.calls)
    assert events[-1].request is newcomer and newcomer.finish_reason == "length"


def test_memory_that_ends_takes_the_youngest_and_gives_it_back():
    model = ScriptedModel(lambda history: (sum(history) * 31 + len(history)) % 251)
    plenty, tight = engine_for(model), engine_for(model, rows=1)
    prompts = [[i, 7] for i in range(4)]
    each = [SamplingParams(temperature=0, max_tokens=100)] * 4
    expected = run(plenty, prompts, each)
    requests = [tight.submit(prompt, params) for prompt, params in zip(prompts, each, strict=True)]
    order = [e.request for _ in range(600) for e in tight.step() if e.finish_reason]
    assert order == requests, "first come, first served"
    assert [(r.tokens, [None] * 100) for r in requests] == expected
    assert requests[0].preemptions == 0 and tight._shared.num_preemptions > 0


def test_a_preempted_tool_call_is_continued():
    call = ["<|python_start|>", "2*3", "<|python_end|>", "..."]
    answers = {key: [*(["x"] * n), *call, *["y"] * (90 - n)] for key, n in (("a", 58), ("b", 60), ("c", 62))}
    prompts = [TOKENIZER.encode(key) for key in answers]
    expected = Engine(scripted(answers), TOKENIZER).complete_many(prompts, GREEDY)
    tight = engine_for(scripted(answers), rows=1)
    requests = [tight.submit(prompt, GREEDY) for prompt in prompts]
    while not tight._shared.is_idle:
        tight.step()
    assert tight._shared.num_preemptions > 0 and [c.tool_calls for c in expected] == [1, 1, 1]
    for request, completion in zip(requests, expected, strict=True):
        assert (request.tokens, request.masks) == (completion.tokens, completion.masks)


def test_a_slow_tool_keeps_only_its_own_row_waiting():
    answers = {"a": ["<|python_start|>", "2*3", "<|python_end|>", "....."], "b": ["y" * 40]}
    prompts = [TOKENIZER.encode(key) for key in answers]
    expected = Engine(scripted(answers), TOKENIZER).complete_many(prompts, GREEDY)
    done = threading.Event()
    tool = SlowTool(lambda text: use_calculator(text) if done.wait(60) else None)
    model = scripted(answers)
    engine = Engine(model, TOKENIZER, {"python": tool})
    calling, talking, given_up = (engine.submit(prompt, GREEDY) for prompt in (*prompts, prompts[0]))
    while not talking.finish_reason:
        engine.step()
    assert [len(r.tokens) for r in (calling, given_up)] == [5, 5] and calling.finish_reason is None
    model.calls.clear()
    begun = time.monotonic()
    assert engine.step() == [] and not model.calls, "a row that waits costs nothing"
    assert time.monotonic() - begun >= 0.9 * TOOL_WAIT_S, "and the loop does not spin"
    engine.cancel(given_up)
    late = engine.submit(prompts[1], replace(GREEDY, max_tokens=3))
    while not late.finish_reason:
        engine.step()
    done.set()
    while not engine._shared.is_idle:
        engine.step()
    assert [(r.tokens, r.masks) for r in (calling, talking)] == [(c.tokens, c.masks) for c in expected]
    assert 0 in calling.masks


def test_rows_are_preempted_while_their_tools_work():
    call = ["<|python_start|>", "2*3", "<|python_end|>", "..."]
    answers = {key: [*(["x"] * n), *call, *["y"] * (90 - n)] for key, n in (("a", 58), ("b", 60), ("c", 62))}
    prompts = [TOKENIZER.encode(key) for key in answers]
    expected = Engine(scripted(answers), TOKENIZER).complete_many(prompts, GREEDY)
    tool = SlowTool(lambda text: time.sleep(0.03) or use_calculator(text))
    for rows in (1, 1.5, 2.5):
        tight = engine_for(scripted(answers), rows, tools={"python": tool})
        assert tight.complete_many(prompts, GREEDY) == expected


def test_samples_that_do_not_fit_together_still_come_in_columns():
    model = small_model("modern")
    roomy, tight = engine_for(model), engine_for(model, rows=1.5)
    expected = list(roomy.generate([5] * 40, num_samples=4, max_tokens=100))
    assert list(tight.generate([5] * 40, num_samples=4, max_tokens=100)) == expected


@pytest.mark.parametrize("shape", ["classic", "modern"])
def test_running_ahead_changes_nothing(shape, monkeypatch):
    """Steps that start before the tokens they read are known, as on a GPU: seeds, stops, penalties and memory."""
    model = small_model(shape)
    prompts = [random.Random(i).choices(range(256), k=length) for i, length in enumerate(LENGTHS)]
    each = [
        SamplingParams(0.9 * (i % 3), 20 if i % 2 else None, 30 + i, seed=i, presence_penalty=0.3 * (i % 4), logprobs=1)
        for i in range(len(prompts))
    ]  # fmt: skip
    expected = run(engine_for(model), prompts, each)
    stop = frozenset(expected[4][0][5:6])
    each[4] = replace(each[4], stop_tokens=stop)
    expected = run(engine_for(model), prompts, each)
    monkeypatch.setattr(RowCache, "can_run_ahead", True)
    for rows, max_batch in ((1e6, 64), (1e6, 3), (2.5, 64)):
        engine = engine_for(model, rows, max_batch=max_batch)
        assert engine._shared.run_ahead
        for (tokens, scores), (expected_tokens, expected_scores) in zip(
            run(engine, prompts, each), expected, strict=True
        ):
            assert tokens == expected_tokens
            assert torch.allclose(torch.tensor(scores), torch.tensor(expected_scores), rtol=0, atol=1e-5)


def test_nothing_is_guessed_where_steps_run_ahead(monkeypatch, caplog):
    model = small_model("classic")
    monkeypatch.setattr(RowCache, "can_run_ahead", True)
    engine = Engine(model, TOKENIZER, speculate=4)
    for _ in range(2):
        list(engine.generate([1, 2, 3] * 5, max_tokens=3))
    assert engine._shared.run_ahead and engine._shared.speculate == 0
    assert caplog.text.count("speculate=4 is left out") == 1


@pytest.mark.parametrize(
    "tool", [use_calculator, SlowTool(lambda text: time.sleep(0.02) or use_calculator(text))]
)
def test_running_ahead_of_tools(tool, monkeypatch):
    call = ["<|python_start|>", "2*3", "<|python_end|>", "..."]
    answers = {key: [*["x"] * n, *call, *["y"] * 20] for key, n in (("a", 9), ("b", 30), ("c", 31))}
    prompts = [TOKENIZER.encode(key) for key in answers]
    expected = Engine(scripted(answers), TOKENIZER).complete_many(prompts, GREEDY)
    monkeypatch.setattr(RowCache, "can_run_ahead", True)
    for rows in (1, 1e6):
        found = engine_for(scripted(answers), rows, tools={"python": tool}).complete_many(prompts, GREEDY)
        assert found == expected
    assert all(0 in completion.masks for completion in expected)


def test_a_request_that_could_never_fit_is_refused():
    engine = engine_for(small_model("classic"), rows=0.5)
    with pytest.raises(ContextOverflow, match="key/value cache"):
        engine.submit([1] * 100, SamplingParams())


def test_windowed_layers_keep_little_more_than_their_window():
    engine = Engine(small_model("modern"), TOKENIZER, chunk_tokens=16)
    engine.submit([9] * 150, SamplingParams(temperature=0, max_tokens=30))
    for _ in range(12):
        engine.step()
    pool = engine.prefixes.pool
    assert pool.group_of == [0, 0, 1] and [group.num_used for group in pool.groups] == [1 + 2 + 4, 1 + 5]


def test_a_long_row_does_not_take_the_memory_of_short_ones():
    engine = engine_for(
        ScriptedModel(lambda history: 65), rows=4
    )  # 19 pages besides the one that is nobody's
    long = engine.submit([1] * 100, SamplingParams(max_tokens=20))
    short = [engine.submit([i, i], SamplingParams(max_tokens=20)) for i in range(15)]
    for _ in range(20):
        engine.step()
        check_pages(engine.prefixes.pool)
    assert long.finish_reason and all(request.finish_reason for request in short)


def test_samples_share_the_pages_of_their_prompt():
    engine = engine_for(ScriptedModel(lambda history: 65), rows=4)
    stream = engine.generate([7] * 99, num_samples=14, max_tokens=20)  # three whole pages and one each
    assert all(len(column) == 14 for column, _ in stream)
    assert engine.prefixes.pool.groups[0].num_used == 1 + 3


def test_generations_that_take_all_memory_say_so():
    engine = engine_for(ScriptedModel(lambda history: 65), rows=1)
    first, second = engine.generate([1] * 100), engine.generate([2] * 100)
    next(first)
    with pytest.raises(ContextOverflow, match="other generations"):
        next(second)
    first.close()
    assert next(engine.generate([2] * 100))[0] == [65]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_that_fails_loses_nothing(ahead, monkeypatch):
    model = small_model("modern")
    prompts = [random.Random(i).choices(range(256), k=length) for i, length in enumerate(LENGTHS)]
    each = [SamplingParams(seed=i, max_tokens=12, logprobs=0) for i in range(len(prompts))]
    expected = [tokens for tokens, _ in run(engine_for(model), prompts, each)]
    monkeypatch.setattr(RowCache, "can_run_ahead", ahead)
    engine = engine_for(model, chunk_tokens=16)
    requests = [engine.submit(prompt, params) for prompt, params in zip(prompts, each, strict=True)]
    choose, calls = engine._shared._sample, []

    def fail_sometimes(*args):
        calls.append(1)
        if len(calls) % 7 == 3:
            raise torch.OutOfMemoryError("no more")
        return choose(*args)

    monkeypatch.setattr(engine._shared, "_sample", fail_sometimes)
    while not engine._shared.is_idle:
        with suppress(torch.OutOfMemoryError):
            engine.step()
        check_pages(engine.prefixes.pool)
    assert len(calls) > 20 and [request.tokens for request in requests] == expected


def test_memory_that_ends_while_pages_are_copied_or_given_back_loses_nothing(monkeypatch):
    model = small_model("modern")
    prompts = [[*range(70)], [*range(70)], [*range(70)], [*range(40), 9], [*range(70), 1, 2, 3], [5] * 90] * 2
    each = [SamplingParams(seed=i, max_tokens=8) for i in range(len(prompts))]
    expected = [tokens for tokens, _ in run(engine_for(model, chunk_tokens=16), prompts, each)]
    engine = engine_for(model, chunk_tokens=16)
    pool, calls, got = engine.prefixes.pool, dict.fromkeys(("copy", "shrink"), 0), defaultdict(list)

    def fail_every_third(name, method):
        def wrapped(*args):
            calls[name] += 1
            if calls[name] % 3 == 2 and calls[name] < 20:  # or a step with three copies would never end
                raise torch.OutOfMemoryError("no more")
            return method(*args)

        monkeypatch.setattr(pool, name, wrapped)

    fail_every_third("copy", pool.copy)
    fail_every_third("shrink", pool.shrink)
    requests = [engine.submit(prompt, params) for prompt, params in zip(prompts, each, strict=True)]
    while not engine._shared.is_idle:
        with suppress(torch.OutOfMemoryError):
            for event in engine.step():
                got[event.request].append(event.token)
        check_pages(pool)
    assert min(calls.values()) > 5 and [got[request] for request in requests] == expected


def test_cancelling_frees_the_memory():
    engine = Engine(ScriptedModel(lambda history: 65), TOKENIZER)
    requests = [engine.submit([i] * 20, SamplingParams()) for i in range(8)]
    engine.step()
    assert rows_bytes(engine) == 8 * PAGE * 2 * 2 * 4
    for request in requests[:7]:
        engine.cancel(request)
    assert rows_bytes(engine) == PAGE * 2 * 2 * 4
    engine.cancel(requests[7])
    assert rows_bytes(engine) == 0


# --- reading equal beginnings once -------------------------------------------------------------------


def tokens_read(model: ScriptedModel) -> int:
    return sum(rows * width for rows, width in model.calls)


def complete(engine: Engine, prompts: list[list[int]], max_tokens: int = 1) -> list[Completion]:
    return engine.complete_many(prompts, SamplingParams(temperature=0, max_tokens=max_tokens))


def test_samples_of_one_prompt_read_it_once():
    model = ScriptedModel(lambda history: 65)
    complete(Engine(model, TOKENIZER), [[7] * 100] * 16)
    assert tokens_read(model) == 100
    model.calls.clear()
    complete(Engine(model, TOKENIZER, chunk_tokens=30, max_batch=8), [[7] * 100] * 16)
    assert tokens_read(model) <= 100 + 20 + 8 * 4, "the second eight find three blocks of 32"


@pytest.mark.parametrize("length", [1, PAGE + 1])
def test_samples_begin_together_where_one_token_is_left_to_read(length):
    model = ScriptedModel(lambda history: 65)
    engine = Engine(model, TOKENIZER)
    list(engine.generate([7] * 40, max_tokens=1))
    model.calls.clear()
    list(engine.generate([7] * length, num_samples=16, max_tokens=4))
    assert model.calls == [(16, 1)] * 4


def test_what_older_weights_computed_is_not_remembered():
    """A stream that goes on after training has pages of the weights before."""
    model, rng = random_model("classic", sequence_len=256, n_layer=2, n_embd=32), random.Random(0)
    engine, text = Engine(model, TOKENIZER), rng.choices(range(256), k=40)
    endless = dict.fromkeys(engine.toolbox.terminals, -1e9)
    stream = engine.generate(text, max_tokens=100, temperature=0, logit_bias=endless)
    text += [next(stream)[0][0] for _ in range(5)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
    list(engine.generate([9] * 5, max_tokens=1))  # notices the new weights
    text += [next(stream)[0][0] for _ in range(60)]
    assert len(engine.prefixes) == 0
    stream.close()


def test_groups_are_resized_rarely_where_memory_is_full():
    model, rng = small_model("modern"), random.Random(0)
    engine = engine_for(model, rows=10, chunk_tokens=16, max_batch=12)
    pool, steps = engine.prefixes.pool, 0
    for i in range(60):
        prompt = rng.choices(range(256), k=rng.randrange(5, 80))
        engine.submit(prompt, SamplingParams(max_tokens=rng.randrange(10, 100), seed=i))
    while not engine._shared.is_idle:
        engine.step()
        steps += 1
        check_pages(pool)
    assert pool.generation < steps / 10


def test_prompts_with_the_same_examples_read_them_once():
    model = ScriptedModel(lambda history: sum(history) % 251)
    examples = random.Random(0).choices(range(256), k=3 * PAGE)
    prompts = [[*examples, i, i + 1] for i in range(10)]
    found = complete(Engine(model, TOKENIZER), prompts)
    assert [c.tokens for c in found] == [[sum(prompt) % 251] for prompt in prompts]
    assert tokens_read(model) == 3 * PAGE + 10 * 2


def test_the_next_turn_of_a_chat_reads_only_what_is_new():
    model = ScriptedModel(lambda history: 65)
    engine = Engine(model, TOKENIZER)
    first = [7] * 50
    answer = [column[0] for column, _ in engine.generate(first, max_tokens=30)]
    model.calls.clear()
    second = [*first, *answer, *[8] * 10]
    assert len(list(engine.generate(second, max_tokens=1))) == 1
    assert tokens_read(model) == len(second) - 64
