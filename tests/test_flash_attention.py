"""Every attention backend that runs here against scores written out in fp64."""

from __future__ import annotations

import pytest
import torch

from nanochat import flash_attention as module
from nanochat.common import UserError
from nanochat.flash_attention import backend, causal_attention, describe_backend, flex_attention
from nanochat.native import find_compiler

pytestmark = pytest.mark.usefixtures("one_seeded_thread")
CPU = torch.device("cpu")
WINDOWS = [-1, 0, 5, 64, 255, 1000]
LENGTH, HEAD = 256, 16


@pytest.fixture
def fresh_choice(monkeypatch):
    """What was chosen before is forgotten, in this test."""
    monkeypatch.setattr(module, "_CHOSEN", {})
    monkeypatch.delenv("NANOCHAT_ATTN", raising=False)


def inputs(
    heads: int, kv_heads: int, length: int = LENGTH, device: str = "cpu", dtype=torch.float32, size=HEAD
):
    return tuple(
        torch.randn(2, length, n, size, device=device).to(dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )


def exact(q, k, v, window):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    position = torch.arange(q.size(2), device=q.device)
    distance = position[:, None] - position
    hidden = (distance < 0) | ((window >= 0) & (distance > window))
    scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def assert_equal_to_exact(attend, tensors, window, tolerance=2e-5):
    results = []
    direction = torch.randn_like(tensors[0])
    for function in (attend, exact):
        output = function(*tensors, window)
        results.append([output, *torch.autograd.grad(output, tensors, direction.to(output.dtype))])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["cpp", "written out", "sdpa"])
def test_outputs_and_gradients_with_windows_and_grouped_heads(name, window, kv_heads, monkeypatch):
    monkeypatch.setattr(module, "CPU_MATERIALISE_UP_TO", 0)
    attend = {"cpp": our_kernel, "written out": module._written_out, "sdpa": module._torch_attention}[name]
    assert_equal_to_exact(attend, inputs(4, kv_heads), window)


def our_kernel(*tensors):
    if find_compiler() is None:
        pytest.skip("no C++ compiler here")
    return module._load_cpp()(*tensors)


@pytest.mark.parametrize("window", [-1, 0, 9])
@pytest.mark.parametrize(("length", "size"), [(1, 8), (7, 24), (48, 64), (49, 32), (131, 128), (20, 12)])
def test_our_kernel_with_sizes_that_fill_no_tile(length, size, window):
    assert_equal_to_exact(our_kernel, inputs(2, 1, length, size=size), window)


def test_our_kernel_computes_the_same_bits_with_any_number_of_threads():
    q, k, v = inputs(4, 2)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = our_kernel(q, k, v, 64)
        results.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")
def test_a_compiled_function_does_without_our_kernel():
    attend = module._load_cpp()
    assert_equal_to_exact(torch.compile(attend, fullgraph=True), inputs(4, 2), 64)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", WINDOWS)
def test_outputs_of_flex_with_windows_and_grouped_heads(window, kv_heads):
    """On a processor torch has no backward pass for it."""
    tensors = [tensor.detach() for tensor in inputs(4, kv_heads)]
    ours, wanted = flex_attention(*tensors, window), exact(*tensors, window)
    torch.testing.assert_close(ours.double(), wanted, rtol=2e-5, atol=2e-5)


def test_flex_is_for_rows_of_training_with_a_window(monkeypatch):
    called = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda *args: called.append(args))
    attend = module._load_flex()
    q = torch.zeros(1, 256, 1, 16)
    attend(q, q, q, 64)
    assert len(called) == 1
    for length, window in ((256, -1), (256, 255), (200, 64)):
        x = torch.zeros(1, length, 1, 16)
        assert attend(x, x, x, window).shape == x.shape
    with torch.no_grad():
        attend(q, q, q, 64)
    assert len(called) == 1
    for rows in (*range(1, 20), 1):  # of shapes without end only the first are worth compiling
        x = torch.zeros(rows, 256, 1, 16)
        attend(x, x, x, 64)
    assert len(called) == 1 + module._FLEX_SHAPES + 1


def test_the_log_says_what_runs(fresh_choice):
    said = describe_backend(CPU, torch.bfloat16)
    assert said.startswith(
        "torch SDPA, on processors written out for short rows (cpu, bfloat16; our C++ kernel: "
    )
    if find_compiler():
        assert describe_backend(CPU, torch.float32) == "our C++ kernel (cpu, float32)"
    assert backend(CPU, torch.float32) is backend(CPU, torch.float32)  # tried once


def test_decoding_chooses_what_training_would(fresh_choice, monkeypatch):
    before, _ = backend(CPU, torch.float32)
    monkeypatch.setattr(module, "_CHOSEN", {})
    with torch.inference_mode():
        assert describe_backend(CPU, torch.float32) == before


@pytest.mark.parametrize("wanted", ["auto", "sdpa"])
def test_rows_use_what_was_chosen(fresh_choice, monkeypatch, wanted):
    monkeypatch.setenv("NANOCHAT_ATTN", wanted)
    assert_equal_to_exact(causal_attention, inputs(2, 1), 40)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("fa4", "NANOCHAT_ATTN='fa4' is unknown; use auto, cpp, fa3, fa2, flex, sdpa"),
        ("fa3", "NANOCHAT_ATTN=fa3 does not run here: Flash Attention 3: .*; use NANOCHAT_ATTN=auto"),
        ("fa2", "NANOCHAT_ATTN=fa2 does not run here: Flash Attention 2: .*; use NANOCHAT_ATTN=auto"),
    ],
)
def test_a_backend_that_is_not_there_is_named(fresh_choice, monkeypatch, wanted, message):
    monkeypatch.setenv("NANOCHAT_ATTN", wanted)
    with pytest.raises(UserError, match=message):
        describe_backend(CPU, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [-1, 5, 64])
@pytest.mark.parametrize("name", ["fa3", "fa2", "flex", "sdpa"])
def test_on_a_gpu_too(fresh_choice, monkeypatch, name, window):
    monkeypatch.setenv("NANOCHAT_ATTN", name)
    try:
        _, attend = backend(torch.device("cuda"), torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error))
    assert_equal_to_exact(attend, inputs(4, 2, device="cuda", dtype=torch.bfloat16), window, 2e-2)
