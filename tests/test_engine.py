"""The engine against the plain generation, and its batching, tools, limits and cancelling."""

from __future__ import annotations

import random
import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import islice

import pytest
import torch

from nanochat.engine import ContextOverflow, Engine, SamplingParams
from nanochat.gpt import GPT
from nanochat.scheduler import Scheduler
from tests.toy_model import VOCAB_SIZE, ByteTokenizer, ScriptedModel, answer_text, random_model, scripted

torch.set_num_threads(1)
TOKENIZER = ByteTokenizer()
BOS, END = 256, TOKENIZER.encode_special("<|assistant_end|>")
CALL, CALL_END = TOKENIZER.encode_special("<|python_start|>"), TOKENIZER.encode_special("<|python_end|>")
OUT, OUT_END = TOKENIZER.encode_special("<|output_start|>"), TOKENIZER.encode_special("<|output_end|>")
GREEDY = SamplingParams(temperature=0)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def uniform_model(**options) -> ScriptedModel:
    return ScriptedModel(lambda history: None, **options)


def columns(engine: Engine, prompt: list[int], **options) -> tuple[list[int], list[int]]:
    """Tokens and masks of the first sample of generate."""
    pairs = list(engine.generate(prompt, **options))
    return [tokens[0] for tokens, _ in pairs], [masks[0] for _, masks in pairs]


# --- equality with the plain path --------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["classic", "modern"])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_greedy_equals_plain_generation(architecture, length):
    model = random_model(architecture)
    prompt = random.Random(length).choices(range(256), k=length)
    plain = list(model.generate(prompt, 40, temperature=0))
    cached, masks = columns(Engine(model, TOKENIZER, tools={}), prompt, max_tokens=40, temperature=0)
    assert cached == plain[: len(cached)] and set(masks) == {1}
    assert len(cached) == 40 or cached[-1] in (BOS, END)


def test_windows_shorter_than_the_text():
    model = random_model("modern", sequence_len=96, short_window_divisor=12, short_window_multiple=8)
    assert min(model.config.window_sizes) == 8
    prompt = random.Random(5).choices(range(256), k=30)
    plain = list(model.generate(prompt, 30, temperature=0))
    cached, _ = columns(Engine(model, TOKENIZER, tools={}), prompt, max_tokens=30, temperature=0)
    assert cached == plain[: len(cached)]


@pytest.mark.parametrize("architecture", ["classic", "modern"])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.0, top_k=20, seed=7)])
def test_a_request_does_not_notice_its_company(architecture, params):
    """Alone = in a batch of strangers of other lengths, with joining, leaving and small batches."""
    model, rng = random_model(architecture), random.Random(1)
    prompts = [rng.choices(range(256), k=rng.randrange(1, 30)) for _ in range(17)]
    limits = [rng.randrange(1, 25) for _ in prompts]
    each = [SamplingParams(params.temperature, params.top_k, n, seed=i) for i, n in enumerate(limits)]
    alone = [Engine(model, TOKENIZER).complete_many([p], [s])[0] for p, s in zip(prompts, each, strict=True)]
    for max_batch in (1, 3, 32):
        together = Engine(model, TOKENIZER, max_batch=max_batch).complete_many(prompts, each)
        assert [c.tokens for c in together] == [c.tokens for c in alone]


@pytest.mark.parametrize("seed", range(3))
def test_random_schedules_of_submits_steps_and_cancels(seed):
    """Rows are kept apart whatever the order of events; the scripted model reads its history from the cache."""
    rng = random.Random(seed)

    def next_token(history: list[int]) -> int:
        return END if len(history) > 20 + history[0] % 30 else (sum(history) * 31 + 7) % 251

    engine = Engine(ScriptedModel(next_token), TOKENIZER, max_batch=5)
    live: dict = {}
    done = cancelled = 0
    for _ in range(700):
        action = rng.random()
        if action < 0.35:
            prompt = rng.choice([rng.choices(range(251), k=rng.randrange(1, 20)), [1, 2, 3]])
            request = engine.submit(prompt, SamplingParams(temperature=0, max_tokens=rng.randrange(1, 40)))
            live[request] = list(prompt)
        elif action < 0.42 and live:
            request = rng.choice(list(live))
            engine.cancel(request)
            assert request.finish_reason == "cancelled"
            del live[request]
            cancelled += 1
        else:
            for event in engine.step():
                history = live[event.request]
                assert event.token == next_token(history)
                history.append(event.token)
                if event.finish_reason:
                    del live[event.request]
                    done += 1
    while live:
        for event in engine.step():
            if event.finish_reason:
                del live[event.request]
    assert engine.step() == [] and done > 50 and cancelled > 10


# --- samples and randomness --------------------------------------------------------------------------


def test_first_tokens_of_samples_differ():
    tokens, _ = next(iter(Engine(uniform_model(), TOKENIZER).generate([BOS], num_samples=16, max_tokens=1)))
    assert len(set(tokens)) > 8


def test_seeds():
    engine = Engine(uniform_model(), TOKENIZER)

    def draw(**options) -> list[int]:
        return columns(engine, ids("hi"), max_tokens=12, **options)[0]

    assert draw() == draw() == draw(seed=42) != draw(seed=43)
    assert draw(temperature=0, seed=1) == draw(temperature=0, seed=2)
    assert draw(seed=None) != draw(seed=None)
    assert draw(seed=5) == engine.complete_many([ids("hi")], SamplingParams(max_tokens=12, seed=5))[0].tokens


def test_more_samples_do_not_change_the_first_ones():
    engine = Engine(random_model(), TOKENIZER)
    few, _ = engine.generate_batch(ids("abc"), num_samples=2, max_tokens=10)
    many, _ = engine.generate_batch(ids("abc"), num_samples=6, max_tokens=10)
    assert many[:2] == few and len({tuple(row) for row in many}) == 6


@pytest.mark.parametrize("num_samples", [1, 4, 16, 100])
@pytest.mark.parametrize("max_tokens", [1, 4, 16])
def test_counts(num_samples, max_tokens):
    engine = Engine(ScriptedModel(lambda history: 65), TOKENIZER, max_batch=8)
    results, masks = engine.generate_batch(ids("xy"), num_samples=num_samples, max_tokens=max_tokens)
    assert results == [ids("xy") + [65] * max_tokens] * num_samples
    assert masks == [[0, 0] + [1] * max_tokens] * num_samples


def test_samples_read_the_prompt_once_and_never_run_in_vain():
    model = scripted({"abc": ["xyz"]})
    list(Engine(model, TOKENIZER).generate(ids("abc"), num_samples=4, temperature=0, max_tokens=3))
    assert model.calls == [(1, 3), (4, 1), (4, 1)], "one prefill, then one step per further token"
    model.calls.clear()
    list(Engine(model, TOKENIZER).generate(ids("abc"), max_tokens=1))
    assert model.calls == [(1, 3)]


def test_finished_rows_cost_nothing():
    model = scripted({"a": ["1"], "b": ["12345678"]})
    Engine(model, TOKENIZER).complete_many([ids("a"), ids("b")], GREEDY)
    assert [rows for rows, _ in model.calls] == [2, 2, 1, 1, 1, 1, 1, 1, 1]


# --- tools -------------------------------------------------------------------------------------------


def test_calculator_output_is_forced_with_mask_zero():
    model = scripted(
        {"q": ["<|python_start|>", "1+2", "<|python_end|>", "<|output_start|>", "3", "<|output_end|>", "ok"]}
    )
    tokens, masks = columns(Engine(model, TOKENIZER), ids("q"), temperature=0)
    assert tokens == [CALL, *ids("1+2"), CALL_END, OUT, *ids("3"), OUT_END, *ids("ok"), END]
    assert masks == [1] * 5 + [0] * 3 + [1] * 3


def test_rows_with_and_without_tools_do_not_disturb_each_other():
    calls = ["<|python_start|>", "'rear'.count('r')", "<|python_end|>"]
    model = scripted({"a": [*calls, *["x"] * 20], "b": ["y" * 30], "c": ["z", *calls, *["w"] * 9]})
    completions = Engine(model, TOKENIZER).complete_many([ids("a"), ids("b"), ids("c")], GREEDY)
    forced = [OUT, *ids("2"), OUT_END]
    for completion, before in zip(completions, (0, None, 1), strict=True):
        where = [i for i, mask in enumerate(completion.masks) if mask == 0]
        start = None if before is None else before + 2 + len("'rear'.count('r')")
        assert where == ([] if start is None else [start, start + 1, start + 2])
        assert [completion.tokens[i] for i in where] == ([] if start is None else forced)
    assert [c.tool_calls for c in completions] == [1, 0, 1]


@pytest.mark.parametrize("expression", ["1/0", "import os", "", "1" * 65])
def test_calls_without_an_answer_inject_nothing(expression):
    model = scripted({"q": ["<|python_start|>", expression, "<|python_end|>", "ok"]})
    tokens, masks = columns(Engine(model, TOKENIZER), ids("q"), temperature=0)
    assert tokens == [CALL, *ids(expression), CALL_END, *ids("ok"), END] and set(masks) == {1}


def test_a_raising_tool_is_counted_and_harmless():
    def broken(expression: str) -> str | None:
        raise RuntimeError(expression)

    model = scripted({"q": ["<|python_start|>", "x", "<|python_end|>", "ok"], "r": ["fine"]})
    engine = Engine(model, TOKENIZER, tools={"python": broken})
    completions = engine.complete_many([ids("q"), ids("r")], GREEDY)
    assert [TOKENIZER.decode(c.content) for c in completions] == ["<|python_start|>x<|python_end|>ok", "fine"]
    assert engine.toolbox.outcomes == {"error": 1}


def test_stray_and_repeated_markers():
    model = scripted({
        "q": ["<|python_end|>", "<|python_start|>", "8", "<|python_start|>", "4*5", "<|python_end|>", *["."] * 9]
    })  # fmt: skip
    tokens, masks = columns(Engine(model, TOKENIZER), ids("q"), temperature=0, max_tokens=12)
    assert tokens[:3] == [CALL_END, CALL, *ids("8")] and tokens[8:12] == [OUT, *ids("20"), OUT_END]
    assert masks == [1] * 8 + [0] * 4


def test_number_format_is_an_option():
    model = scripted({"q": ["<|python_start|>", "0.2*50", "<|python_end|>", *["."] * 9]})
    texts = {}
    for tool_format in ("gsm8k", "python"):
        completion = Engine(model, TOKENIZER, tool_format=tool_format).complete_many([ids("q")], GREEDY)[0]
        forced = [t for t, mask in zip(completion.tokens, completion.masks, strict=True) if not mask]
        texts[tool_format] = TOKENIZER.decode(forced[1:-1])
    assert texts == {"gsm8k": "10", "python": "10.0"}


def test_forced_tokens_count_and_can_be_cut():
    model = scripted({"q": ["<|python_start|>", "1+2", "<|python_end|>", "..."]})
    tokens, _ = columns(Engine(model, TOKENIZER), ids("q"), temperature=0, max_tokens=6)
    assert tokens[-1] == OUT and len(tokens) == 6


# --- ends and limits ---------------------------------------------------------------------------------


def test_terminal_tokens():
    for name, terminal in (("<|bos|>", BOS), ("<|assistant_end|>", END)):
        engine = Engine(scripted({"q": ["hi", name, "more"]}), TOKENIZER)
        assert columns(engine, ids("q"), temperature=0)[0] == [*ids("hi"), terminal]
        assert engine.generate_batch(ids("q"), temperature=0) == ([ids("qhi")], [[0, 1, 1]])
        completion = engine.complete_many([ids("q")], GREEDY)[0]
        assert completion.tokens == [*ids("hi"), terminal] and completion.masks == [1, 1, 1]
        assert (
            completion.ended_by_token
            and completion.content == ids("hi")
            and completion.finish_reason == "stop"
        )


def test_stop_tokens_and_length():
    engine = Engine(scripted({"q": ["hi there"]}), TOKENIZER)
    stop = frozenset(ids("e"))
    completion = engine.complete_many([ids("q")], SamplingParams(temperature=0, stop_tokens=stop))[0]
    assert TOKENIZER.decode(completion.content) == "hi th" and completion.finish_reason == "stop"
    assert engine.generate_batch(ids("q"), temperature=0, stop_tokens=stop)[0] == [ids("qhi th")]
    cut = engine.complete_many([ids("q")], SamplingParams(temperature=0, max_tokens=2))[0]
    assert (cut.finish_reason, cut.ended_by_token, cut.content) == ("length", False, ids("hi"))


def test_stop_strings():
    call = ["<|python_start|>", "'e'.count('e')", "<|python_end|>", "...", "then"]
    engine = Engine(scripted({"q": ["hi there, you"], "t": call}), TOKENIZER)
    params = SamplingParams(temperature=0, stop=("re,", "xx"))
    completion = engine.complete_many([ids("q")], params)[0]
    assert (completion.finish_reason, completion.ended_by_token) == ("stop", False)
    assert completion.content == ids("hi there,")
    assert answer_text(TOKENIZER, completion.content, params.stop) == "hi the"
    assert columns(engine, ids("q"), temperature=0, stop=("re,",))[0] == ids("hi there,")
    in_call = engine.complete_many([ids("t")], replace(params, stop=("e",)))[0]
    assert answer_text(TOKENIZER, in_call.content, ("e",)) == "th" and in_call.tool_calls == 1
    unmet = engine.complete_many([ids("q")], replace(params, stop=("zz",)))[0]
    assert unmet.ended_by_token and unmet.content == ids("hi there, you")


def test_finished_samples_are_padded_in_columns():
    def next_token(history: list[int]) -> int | None:
        if len(history) == 1:
            return None
        return END if len(history) > 2 and history[1] % 2 else 65 + len(history)

    pairs = list(
        Engine(ScriptedModel(next_token), TOKENIZER).generate(ids("q"), num_samples=12, max_tokens=6)
    )
    odd = [row for row in range(12) if pairs[0][0][row] % 2]
    assert len(pairs) == 6 and odd and len(odd) < 12
    for tokens, masks in pairs:
        assert len(tokens) == len(masks) == 12
    for tokens, masks in pairs[3:]:
        assert all(tokens[row] == END and masks[row] == 0 for row in odd)
        assert all(masks[row] == 1 for row in range(12) if row not in odd)


def test_nothing_to_generate():
    engine = Engine(uniform_model(sequence_len=16), TOKENIZER)
    assert list(engine.generate([1], max_tokens=0)) == []
    assert list(engine.generate([1] * 16)) == [] == list(engine.generate([1] * 40, max_tokens=5))
    completion = engine.complete_many([[1] * 20, [1]], SamplingParams(max_tokens=3, temperature=0))[0]
    assert (completion.tokens, completion.finish_reason) == ([], "length")
    request = engine.submit([1] * 16, SamplingParams())
    assert [(e.request, e.token, e.finish_reason) for e in engine.step()] == [(request, None, "length")]
    assert engine.step() == []


@pytest.mark.parametrize(("prompt", "error"), [([], ValueError), ([-1], ValueError), ([VOCAB_SIZE], ValueError), ([1.5], ValueError), ([1] * 161, ContextOverflow)])  # fmt: skip
def test_impossible_prompts(prompt, error):
    with pytest.raises(error):
        Engine(uniform_model(sequence_len=16), TOKENIZER).generate(prompt)
    with pytest.raises(ValueError, match="num_samples"):
        Engine(uniform_model(), TOKENIZER).generate([1], num_samples=0)


def test_context_policies(caplog):
    engine = Engine(ScriptedModel(lambda history: 65, sequence_len=16), TOKENIZER)
    assert len(columns(engine, [1] * 10)[0]) == 6, "clipped to the context"
    assert len(columns(engine, [1] * 10, max_tokens=100)[0]) == 6
    assert len(columns(engine, [1] * 10, max_tokens=100, extend_context=True)[0]) == 100
    assert caplog.text.count("beyond the trained context") == 1
    assert len(columns(engine, [1] * 10, extend_context=True)[0]) == 150
    assert "144 tokens beyond the trained context" in caplog.text
    caplog.clear()
    engine.complete_many([[1] * 10] * 3, SamplingParams(max_tokens=9, extend_context=True))
    assert caplog.text.count("3 tokens beyond the trained context") == 1


def test_a_real_model_up_to_the_end_of_its_context():
    model = random_model(sequence_len=32)
    engine = Engine(model, TOKENIZER, tools={})
    tokens, _ = columns(engine, [5] * 3, temperature=0)
    assert len(tokens) == 29 or tokens[-1] in (BOS, END)
    assert tokens == list(model.generate([5] * 3, len(tokens), temperature=0))


# --- cancelling --------------------------------------------------------------------------------------


def test_should_stop_is_asked_once_per_column():
    asked = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) > 3

    engine = Engine(ScriptedModel(lambda history: 65), TOKENIZER)
    assert len(list(engine.generate([1], should_stop=should_stop))) == 3 and len(asked) == 4


def test_closing_the_generator_frees_the_cache(monkeypatch):
    schedulers = []
    step = Scheduler.step

    def spy(self):
        schedulers.append(weakref.ref(self))
        return step(self)

    monkeypatch.setattr(Scheduler, "step", spy)
    engine = Engine(ScriptedModel(lambda history: 65), TOKENIZER)
    stream, pages = engine.generate([1]), engine.prefixes.pool.groups[0]
    assert len(list(islice(stream, 3))) == 3 and pages.num_used == 2
    stream.close()
    assert pages.num_used == 1
    del stream
    assert schedulers[0]() is None


def test_waiting_requests_can_be_cancelled():
    engine = Engine(ScriptedModel(lambda history: 65), TOKENIZER, max_batch=1)
    first, second, third = (engine.submit([i], SamplingParams(max_tokens=2)) for i in (1, 2, 3))
    engine.step()
    engine.cancel(second)
    engine.cancel(second)
    seen = [event.request for _ in range(4) for event in engine.step()]
    assert seen == [first, third, third] and second.finish_reason == "cancelled" and second.tokens == []


# --- what comes with a token -------------------------------------------------------------------------


def test_logprobs_of_sampled_tokens():
    model = random_model()
    engine = Engine(model, TOKENIZER, tools={})
    engine.submit(ids("abc"), SamplingParams(temperature=0.0, max_tokens=1, logprobs=2))
    engine.submit(ids("abc"), SamplingParams(temperature=0.0, max_tokens=1))
    with_scores, without = engine.step()
    logprobs = model.forward(torch.tensor([ids("abc")]), last_only=True)[0, 0].log_softmax(-1)
    assert with_scores.logprob == pytest.approx(logprobs.max().item(), abs=1e-5)
    assert with_scores.top_logprobs[0] == pytest.approx((with_scores.token, with_scores.logprob))
    assert len(with_scores.top_logprobs) == 2 and without.logprob is None and without.top_logprobs == ()


def test_complete_many_checks_its_arguments_and_takes_none():
    engine = Engine(uniform_model(), TOKENIZER)
    assert engine.complete_many([], GREEDY) == []
    with pytest.raises(ValueError, match="2 sampling parameters for 1 prompts"):
        engine.complete_many([[1]], [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="max_batch"):
        Engine(uniform_model(), TOKENIZER, max_batch=0)


def test_equal_prompts_of_one_call_get_different_streams():
    engine = Engine(uniform_model(), TOKENIZER)
    completions = engine.complete_many([[1]] * 8, SamplingParams(max_tokens=4, seed=3))
    assert len({tuple(c.tokens) for c in completions}) == 8
    again = Engine(uniform_model(), TOKENIZER, max_batch=2).complete_many(
        [[1]] * 8, SamplingParams(max_tokens=4, seed=3)
    )
    assert again == completions


def test_self_check_needs_a_checkpoint(tmp_path, monkeypatch):
    from nanochat.common import UserError
    from nanochat.engine import Config, main

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="no checkpoint"):
        main(Config(device_type="cpu"))


def test_self_check_computes_in_fp32(monkeypatch, capsys):
    """In bf16 the best two tokens of a healthy model may be within rounding."""
    from nanochat import checkpoint_manager
    from nanochat.engine import Config, main

    class Tokenizer(ByteTokenizer):
        def encode(self, text, prepend=BOS):
            return [prepend, *text.encode()]

    plain, loaded = random_model("classic"), []

    def load_model(*_, dtype=torch.bfloat16, **__):
        loaded.append(GPT.build(plain.config, "cpu", dtype).eval())
        loaded[0].load_state_dict(plain.state_dict())
        return loaded[0], Tokenizer(), {}

    monkeypatch.setattr(checkpoint_manager, "load_model", load_model)
    with pytest.raises(SystemExit, match="0"):
        main(Config(device_type="cpu", max_tokens=8))
    assert loaded[0].compute_dtype == torch.float32 and "Match: True" in capsys.readouterr().out


def test_a_stream_left_open_says_nothing_when_the_process_ends():
    lines = [
        "from nanochat.engine import Engine",
        "from tests.toy_model import ByteTokenizer, ScriptedModel",
        "stream = Engine(ScriptedModel(lambda history: 65), ByteTokenizer()).generate([1, 2])",
        "next(stream)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
