"""The compiled step of processors computes what the network does, alone and in company."""

from __future__ import annotations

import random

import pytest
import torch

from nanochat import cpu_decode
from nanochat.cpu_decode import CpuDecoder
from nanochat.engine import Engine, SamplingParams
from nanochat.gpt import GPT, Linear
from nanochat.lora import add_adapters
from nanochat.native import load_library
from nanochat.quantize import quantize
from nanochat.row_cache import RowCache
from tests import toy_model
from tests.toy_model import ByteTokenizer, begun_cache, row_contents

pytestmark = [
    pytest.mark.usefixtures("one_seeded_thread"),
    pytest.mark.skipif(load_library("cpu_decode") is None, reason="no C++ compiler here"),
]
SHAPES = [
    ("classic", {}),
    ("classic", dict(n_layer=3, n_head=6, n_kv_head=2, n_embd=144)),
    ("modern", {}),
    (
        "modern",
        dict(sequence_len=96, n_layer=5, n_kv_head=1, short_window_divisor=12, short_window_multiple=8),
    ),
]


def random_model(architecture: str, **sizes) -> GPT:
    """A random network with a vocabulary of whole vectors."""
    return toy_model.random_model(architecture, **{"vocab_size": 272, **sizes})


def prefilled(model: GPT, lengths: list[int], width: int = 16) -> RowCache:
    """A cache of rows with random beginnings; two of them are equal if their lengths are."""
    cache = begun_cache(model, len(lengths), 96, width)
    for row, length in enumerate(lengths):
        ids = torch.tensor([random.Random(length).choices(range(256), k=length)])
        cache.forward(row, row + 1, ids)
    return cache


def tokens(rows: int, step: int) -> list[int]:
    return random.Random(step).choices(range(256), k=rows)


def narrow(model: GPT) -> None:
    for module in model.modules():
        if isinstance(module, Linear):
            module.to(torch.bfloat16)


def decoder(model: GPT) -> CpuDecoder:
    made = CpuDecoder.of(model)
    assert made is not None
    return made


@pytest.mark.parametrize(("architecture", "sizes"), SHAPES)
@torch.inference_mode()
def test_equals_the_network(architecture, sizes):
    model = random_model(architecture, **sizes)
    compiled, eager = prefilled(model, [5, 1, 16, 9]), prefilled(model, [5, 1, 16, 9])
    step = decoder(model).step
    for number in range(70):  # beyond windows and around their rings
        ids = tokens(4, number)
        expected = eager.forward(0, 4, torch.tensor(ids)[:, None])
        torch.testing.assert_close(step(compiled, 4, ids), expected, atol=2e-5, rtol=0)
    assert compiled.positions == eager.positions == [75, 71, 86, 79]
    for row in range(4):
        for ours, theirs in zip(row_contents(compiled, row), row_contents(eager, row), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    if compiled.previous is not None and eager.previous is not None:
        torch.testing.assert_close(compiled.previous, eager.previous, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("architecture", "rows"), [("classic", 5), ("modern", 5), ("modern", 11), ("modern", 43)]
)
@torch.inference_mode()
def test_company_and_threads_change_no_bit(architecture, rows, kind):
    model = random_model(architecture, n_layer=3)
    if kind == "int8":
        quantize(model, "int8")
    elif kind == "bfloat16":
        narrow(model)
    lengths = [1 + 5 * row % 17 for row in range(rows)]
    together, alone = prefilled(model, lengths), [prefilled(model, [length]) for length in lengths]
    step = decoder(model).step
    for number in range(20):
        ids = tokens(rows, number)
        torch.set_num_threads(1 + number % 3)
        found = step(together, rows, ids)
        torch.set_num_threads(1)
        for row, cache in enumerate(alone):
            assert torch.equal(step(cache, 1, ids[row : row + 1])[0], found[row])


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("architecture", "sizes"), SHAPES)
@torch.inference_mode()
def test_a_stretch_of_a_prompt_has_the_bits_of_its_tokens_one_by_one(architecture, sizes, kind):
    """Of several rows at once and of different lengths, at their beginnings and beyond windows and their rings."""
    model = random_model(architecture, **sizes)
    if kind == "int8":
        quantize(model, "int8")
    elif kind == "bfloat16":
        model.compute_dtype = torch.bfloat16
        model.init_rotary()
    together, alone = begun_cache(model, 3, 96), begun_cache(model, 3, 96)
    read = decoder(model).read
    for number, lengths in enumerate(
        [(5, 1, 16), (1, 13, 1), (16, 16, 16), (2, 1, 3), (16, 11, 16), (9, 16, 1)]
    ):
        spans = [tokens(length, 10 * number + row) for row, length in enumerate(lengths)]
        torch.set_num_threads(1 + number % 3)
        found = read(together, 0, spans)
        torch.set_num_threads(1)
        for row, span in enumerate(spans):
            for token in span:
                last = read(alone, row, [[token]])
            assert torch.equal(last[0], found[row])
    assert together.positions == alone.positions == [49, 58, 53]
    for row in range(3):
        for one, other in zip(row_contents(together, row), row_contents(alone, row), strict=True):
            assert torch.equal(one, other)
    if together.previous is not None:
        assert torch.equal(together.previous, alone.previous)


@pytest.mark.parametrize(("architecture", "sizes"), SHAPES)
@torch.inference_mode()
def test_reading_prompts_equals_the_network(architecture, sizes, monkeypatch):
    model = random_model(architecture, **sizes)
    compiled, eager = begun_cache(model, 3, 96), begun_cache(model, 3, 96)
    assert compiled.reads_ragged(0, [16, 16, 16])
    for number, lengths in enumerate([(5, 1, 16), (16, 16, 2), (2, 7, 16)]):
        spans = [tokens(length, 10 * number + row) for row, length in enumerate(lengths)]
        found = compiled.read(0, spans)
        monkeypatch.setattr(CpuDecoder, "reads", lambda *args: False)
        torch.testing.assert_close(found, eager.read(0, spans), atol=2e-5, rtol=0)
        monkeypatch.undo()
    assert compiled.positions == eager.positions


@torch.inference_mode()
def test_weights_are_used_where_they_lie():
    model = random_model("modern")
    step, cache = decoder(model).step, prefilled(model, [4])
    before = step(cache, 1, [7])
    for parameter in model.parameters():
        parameter.mul_(0.5)
    changed, eager = prefilled(model, [4]), prefilled(model, [4])
    after = step(changed, 1, [7])
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, eager.forward(0, 1, torch.tensor([[7]])), atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@torch.inference_mode()
def test_narrow_weights(kind):
    """The same numbers in fewer bits: the network with these weights, widened, is the reference."""
    model, wide = random_model("modern", n_embd=64), random_model("modern", n_embd=64)
    if kind == "int8":
        quantize(model, "int8")
        narrow = {name: m for name, m in model.named_modules() if hasattr(m, "scale")}
        assert len(narrow) == 4 * 6 + 1
        for name, module in narrow.items():
            wide.get_submodule(name).weight.copy_(module.weight.float() * module.scale[:, None])
    else:
        for module, target in zip(model.modules(), wide.modules(), strict=True):
            if isinstance(module, Linear):
                module.to(torch.bfloat16)
                target.weight.copy_(module.weight)
    caches = prefilled(wide, [5, 9]), prefilled(wide, [5, 9])
    step = decoder(model).step
    for number in range(10):
        expected = caches[0].forward(0, 2, torch.tensor(tokens(2, number))[:, None])
        torch.testing.assert_close(step(caches[1], 2, tokens(2, number)), expected, atol=5e-5, rtol=0)


@torch.inference_mode()
def test_a_bfloat16_cache():
    model = random_model("modern")
    narrow(model)
    model.compute_dtype = torch.bfloat16
    model.init_rotary()
    compiled, eager = prefilled(model, [5, 9]), prefilled(model, [5, 9])
    assert compiled.pool.keys[0].dtype == torch.bfloat16
    for number in range(10):
        ids = tokens(2, number)
        found = decoder(model).step(compiled, 2, ids)
        expected = eager.forward(0, 2, torch.tensor(ids)[:, None])
        assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()  # both round, in other places


def test_what_the_compiled_step_does_not_know_goes_the_plain_way():
    class Other(Linear):
        pass

    model = random_model("classic")
    assert CpuDecoder.of(model) is not None
    model.blocks[0].mlp.c_fc.__class__ = Other
    assert CpuDecoder.of(model) is None
    assert CpuDecoder.of(random_model("classic", n_head=16)) is None  # heads of 4
    assert CpuDecoder.of(random_model("classic", vocab_size=270)) is None
    assert CpuDecoder.of(object()) is None


def test_the_engine_generates_the_same_without_it(monkeypatch):
    model = random_model("modern")
    prompts = [random.Random(n).choices(range(256), k=n) for n in (3, 40, 17)]
    params = SamplingParams(temperature=0, max_tokens=30, logprobs=0)
    with_it = Engine(model, ByteTokenizer(), tools={}).complete_many(prompts, params)
    monkeypatch.setattr("nanochat.row_cache.CpuDecoder.of", lambda model: None)
    assert Engine(model, ByteTokenizer(), tools={}).complete_many(prompts, params) == with_it


@pytest.mark.parametrize("context", [512, 150])
def test_long_prompts_that_come_together_are_read_as_they_are(context, monkeypatch):
    """Longer than a chunk and the rings of short windows; some beyond what the compiled step reads, some not."""
    monkeypatch.setattr(cpu_decode, "_READ_CONTEXT", context)
    model = random_model(
        "modern", sequence_len=512, n_layer=3, short_window_divisor=32, short_window_multiple=16
    )
    prompts = [random.Random(n).choices(range(256), k=n) for n in (300, 5, 200, 131, 30, 290)]
    params = SamplingParams(temperature=0, max_tokens=12)
    engine = Engine(model, ByteTokenizer(), tools={})
    rows = [engine.submit(prompt, params) for prompt in prompts[:3]]
    engine.step()
    rows += [engine.submit(prompt, params) for prompt in prompts[3:]]  # while others are generating
    while any(row.finish_reason is None for row in rows):
        engine.step()
    for prompt, row in zip(prompts, rows, strict=True):
        assert row.tokens == list(model.generate(prompt, len(row.tokens), temperature=0)), len(prompt)


def test_what_training_puts_in_a_layers_place_is_left_to_the_network():
    model = random_model("modern")
    add_adapters(model, rank=2, alpha=4.0)
    assert CpuDecoder.of(model) is None
