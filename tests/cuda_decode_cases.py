"""The GPU's decode step computes what the network does: cases that test_cuda_decode.py runs in a process of their own.

Without a GPU that process runs the kernels in Triton's interpreter, which must be chosen before Triton is imported.
"""

from __future__ import annotations

import random

import pytest
import torch

from nanochat.cuda_decode import CudaDecoder
from nanochat.cuda_network import CudaNetwork
from nanochat.gpt import GPT, NORM_EPS
from nanochat.quantize import QuantizedLinear, replace_matrices
from nanochat.row_cache import RowCache
from tests.toy_model import begun_cache, random_model, row_contents

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
HALF = torch.bfloat16 if HAS_GPU else torch.float16  # bf16 products are wrong in the interpreter
KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
WINDOWS = dict(sequence_len=96, short_window_divisor=12, short_window_multiple=8)


def small_model(architecture: str, **sizes) -> GPT:
    small = {"vocab_size": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
    return random_model(architecture, **{**small, **sizes}).to(DEVICE)


def prefilled(model: GPT, lengths: list[int], decoder: CudaDecoder | None) -> RowCache:
    cache = begun_cache(model, len(lengths), 80)
    cache._decoder = decoder
    for row, length in enumerate(lengths):
        ids = random.Random(length).choices(range(64), k=length)
        cache.forward(row, row + 1, torch.tensor([ids], device=DEVICE))
    return cache


def check(model: GPT, lengths: list[int], ready: int, steps: int, expected_by: GPT | None = None) -> None:
    """Some steps of the first rows, against the network's."""
    ours = prefilled(model, lengths, CudaDecoder(model, use_graphs=HAS_GPU))
    theirs = prefilled(expected_by or model, lengths, None)
    for number in range(steps):
        ids = random.Random(number).choices(range(64), k=ready)
        expected = theirs.decode(ready, ids)
        given = torch.tensor(ids, device=DEVICE) if number % 2 else ids
        torch.testing.assert_close(ours.decode(ready, given), expected, atol=3e-5, rtol=0)
    assert ours.positions == theirs.positions
    for row in range(len(lengths)):
        for a, b in zip(row_contents(ours, row), row_contents(theirs, row), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    if ours.previous is not None and theirs.previous is not None:
        torch.testing.assert_close(ours.previous, theirs.previous, atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [[20], [5, 1, 16]])
@pytest.mark.parametrize("architecture", ["classic", "modern"])
def test_equals_the_network(architecture, lengths):
    check(small_model(architecture), lengths, len(lengths), 2)


@torch.inference_mode()
def test_windows_and_their_rings():
    check(small_model("modern", n_kv_head=4, **WINDOWS), [61, 60], 2, 6)


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [[6], [6, 9]])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised(kind, lengths):
    model = small_model("modern")
    replace_matrices(model, kind)
    check(model, lengths, len(lengths), 1)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "inputs", "sizes"),
    [(1, 200, [90]), (2, 64, [33]), (7, 1288, [70]), (16, 1096, [64, 24, 40]), (33, 2056, [65])],
)
def test_products_of_quantised_matrices(rows, inputs, sizes, kind, dtype):
    """With all that is fused; odd sizes, K in one part and in several, one layer and three."""
    torch.manual_seed(rows)
    network = CudaNetwork(small_model("classic", vocab_size=31))
    linears = [torch.nn.Linear(inputs, size, bias=False, device=DEVICE) for size in sizes]
    layers = [QuantizedLinear(linear, KINDS[kind]) for linear in linears]
    matrix = torch.cat([layer.weight.double() * layer.scale[:, None].double() for layer in layers])
    x = torch.randn(rows, inputs, device=DEVICE).to(dtype)
    residual = torch.randn(rows, sum(sizes), device=DEVICE).to(dtype)
    exact = x.double() @ matrix.t()
    normed = x.double() / (x.double().square().mean(1, keepdim=True) + NORM_EPS).sqrt()
    capped = 15 * torch.tanh(normed @ matrix[:31].t() / 15)  # without the padding of the head
    for given, expected in (
        ({}, exact),
        ({"residual": residual}, exact + residual),  # a second time in parts, whose count must begin at 0
        ({"square": True}, exact.relu().square()),
        *([({"norm": True, "softcap": 15.0}, capped)] if len(layers) == 1 else []),
    ):
        found = network.linear(x, layers, **given)
        assert found.dtype == (torch.float32 if "softcap" in given else dtype)
        # A GPU adds one after the other, so that longer sums are rounded more.
        longest = inputs if HAS_GPU else 0
        error = max(torch.finfo(dtype).eps, 2e-6 * max(longest / 512, 1) ** 0.5)
        torch.testing.assert_close(found.double(), expected, atol=error, rtol=error)
    assert not network.arrived.any()


@torch.inference_mode()
def test_padding_spares_rows_that_are_not_ready():
    """Three rows step as four; the fourth is in the middle of its prompt and goes on as if nothing had happened."""
    model = small_model("modern", **WINDOWS)
    check(model, [7, 3, 12, 30, 5], 3, 2)
    ours, theirs = (
        prefilled(model, [7, 3, 12, 30, 5], decoder) for decoder in (CudaDecoder(model, HAS_GPU), None)
    )
    ours.decode(3, [1, 2, 3])
    theirs.decode(3, [1, 2, 3])
    more = torch.tensor([[4, 5, 6]], device=DEVICE)
    torch.testing.assert_close(ours.forward(3, 4, more), theirs.forward(3, 4, more), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_prompts_of_quantised_matrices_before_and_after_the_first_step():
    """The first step may move counters that the graph of a prompt uses, too."""
    model = small_model("classic", n_embd=256, n_layer=1)
    replace_matrices(model, "int8")
    caches = [begun_cache(model, 70, 40) for _ in range(2)]
    for cache, decoder in zip(caches, (CudaDecoder(model, use_graphs=HAS_GPU), None), strict=True):
        cache._decoder = decoder
        while len(cache.positions) > 2:
            cache.remove_row(len(cache.positions) - 1)
    ours, theirs = caches
    for span in ([1, 2, 3], [4, 5], [6]):
        for _ in range(2):
            torch.testing.assert_close(ours.read(0, [span]), theirs.read(0, [span]), atol=3e-5, rtol=0)
        torch.testing.assert_close(ours.decode(1, span[:1]), theirs.decode(1, span[:1]), atol=3e-5, rtol=0)


@pytest.fixture
def poisoned_memory():
    """What nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@torch.inference_mode()
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("architecture", "kv_heads"), [("classic", 4), ("modern", 2)])
def test_prompts(architecture, kv_heads):
    """Rows that are read in chunks of their own, beyond windows and rings, and then go on one token at a time."""
    model = small_model(architecture, n_kv_head=kv_heads, n_layer=3, **WINDOWS)
    decoder = CudaDecoder(model, use_graphs=HAS_GPU)
    ours, theirs = begun_cache(model, 3, 110, 40), begun_cache(model, 3, 110, 40)
    ours._decoder, theirs._decoder = decoder, None
    assert ours.reads_ragged(0, [1, 2])
    rng = random.Random(kv_heads)
    # The last of them is from the graph, where there are graphs: of the third time that 128 tokens of four rows are read.
    for chunks in ([40, 3, 1], [32, 33, 1], [2, 35, 40], [29, 30, 31]):
        spans = [rng.choices(range(64), k=count) for count in chunks]
        torch.testing.assert_close(ours.read(0, spans), theirs.read(0, spans), atol=3e-5, rtol=0)
    for pages in ours.pool.keys + ours.pool.values:
        assert torch.isfinite(
            pages[0]
        ).all()  # where the padding is, which PyTorch reads with a weight of zero
    spans = [rng.choices(range(64), k=count) for count in (3, 1)]
    torch.testing.assert_close(ours.read(1, spans), theirs.read(1, spans), atol=3e-5, rtol=0)
    for _ in range(2):
        ids = rng.choices(range(64), k=3)
        torch.testing.assert_close(ours.decode(3, ids), theirs.decode(3, ids), atol=3e-5, rtol=0)
    assert ours.positions == theirs.positions
