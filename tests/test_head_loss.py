"""The loss in chunks against the loss of whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanochat import head_loss as module
from nanochat.head_loss import head_loss

pytestmark = pytest.mark.usefixtures("one_seeded_thread")
ROWS, WIDTH, VOCAB, PADDED, CAP = 23, 16, 50, 64, 15.0


@pytest.fixture(params=[1, 7, 1000])
def rows_per_chunk(request, monkeypatch):
    """One row at a time, chunks with a shorter last one, and a single chunk."""
    monkeypatch.setattr(module, "CHUNK_LOGITS_ELSEWHERE", request.param * VOCAB)


def whole(x, weight, targets, vocab_size, softcap, reduction):
    logits = (x @ weight[:vocab_size].to(x.dtype).t()).float()
    logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


def problem(dtype=torch.float32):
    x = (4 * torch.randn(ROWS, WIDTH)).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, WIDTH).requires_grad_()  # logits up to 40: the cap bends them
    targets = torch.randint(0, VOCAB, (ROWS,))
    targets[::3] = -1
    return x, weight, targets


def gradients(function, x, weight, targets, reduction):
    """Loss and gradients of a weighted sum, so that every row's gradient has a factor of its own."""
    x.grad = weight.grad = None
    loss = function(x, weight, targets, VOCAB, CAP, reduction)
    (loss * torch.linspace(0.5, 2, max(loss.numel(), 1)).view(loss.shape)).sum().backward()
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_loss_and_gradients_equal_those_of_whole_logits(rows_per_chunk, reduction):
    inputs = problem()
    ours = gradients(head_loss, *inputs, reduction)
    for mine, exact in zip(ours, gradients(whole, *inputs, reduction), strict=True):
        torch.testing.assert_close(mine, exact, rtol=2e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(*inputs, VOCAB, CAP, reduction), ours[0], rtol=1e-6, atol=1e-6)


def test_bf16_gradients_keep_their_dtypes(rows_per_chunk):
    inputs = problem(torch.bfloat16)
    loss, grad_x, grad_weight = gradients(head_loss, *inputs, "sum")
    assert (loss.dtype, grad_x.dtype, grad_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    for mine, exact in zip((loss, grad_x, grad_weight), gradients(whole, *inputs, "sum"), strict=True):
        assert (mine.float() - exact.float()).norm() < 0.01 * exact.float().norm()


def test_without_targets_the_sum_and_its_gradients_are_zero(rows_per_chunk):
    x, weight, targets = problem()
    loss, grad_x, grad_weight = gradients(head_loss, x, weight, torch.full_like(targets, -1), "sum")
    assert loss == 0 and not grad_x.any() and not grad_weight.any()
    assert head_loss(x, weight, torch.full_like(targets, -1), VOCAB, CAP, "mean").isnan()


def test_no_tensor_is_as_large_as_all_logits(monkeypatch):
    """Forward and backward, watched operation by operation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(module, "CHUNK_LOGITS_ELSEWHERE", 4 * VOCAB)
    inputs = problem()
    for reduction in ("sum", "none"):
        with Watch():
            gradients(head_loss, *inputs, reduction)
    assert largest == PADDED * WIDTH < ROWS * VOCAB  # the head's gradient


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(monkeypatch, backend):
    from nanochat.compilation import should_compile

    if backend == "inductor" and not should_compile("auto", torch.device("cpu"))[0]:
        pytest.skip("no compiler")
    monkeypatch.setattr(module, "CHUNK_LOGITS_ELSEWHERE", 8 * VOCAB)
    compiled = torch.compile(head_loss, fullgraph=True, dynamic=False, backend=backend)
    inputs = problem()
    ours = gradients(compiled, *inputs, "sum")
    for mine, exact in zip(ours, gradients(head_loss, *inputs, "sum"), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)
