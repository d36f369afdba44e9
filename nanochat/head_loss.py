"""Cross entropy on top of the output head, a few rows at a time: the logits never exist as a whole.

In fp32 they would be the largest tensor of a training step (17 GB for 64 x 2048 tokens of a 32K vocabulary),
and the loss needs several of that size. Here a chunk's logits live until its losses and gradients are known;
what is kept for the backward pass is as large as the hidden states and the head's own gradient.

N rows, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat.memory import CHUNK_LOGITS_CUDA, CHUNK_LOGITS_ELSEWHERE


def head_loss(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, softcap: float, reduction: str
) -> Tensor:
    """Loss of softcap * tanh(x weightT / softcap) against targets, in fp32.

    x: hidden states (N, C); weight (V or more, C), of which vocab_size rows count; targets (N,) int64, -1 = none.
    reduction: "mean" over targets (NaN without any), "sum", or "none" for (N,) with 0 where there is no target.
    """
    chunk = CHUNK_LOGITS_CUDA if x.device.type == "cuda" else CHUNK_LOGITS_ELSEWHERE
    rows = max(chunk // vocab_size, 1)
    if reduction == "none":
        return torch.cat(_losses(x, weight, targets, vocab_size, softcap, rows))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # In conversations half of the positions and more have no target. On a GPU their number would be waited for.
        (supervised,) = (targets >= 0).nonzero(as_tuple=True)
        x, targets = x[supervised], targets[supervised]
    if torch.is_grad_enabled():
        total = _SummedLoss.apply(x, weight, targets, vocab_size, softcap, rows, weight.requires_grad)
        assert isinstance(total, Tensor)
    else:
        total = torch.stack(
            [part.sum() for part in _losses(x, weight, targets, vocab_size, softcap, rows)]
        ).sum()
    return total if reduction == "sum" else total / (targets >= 0).sum()


def _losses(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, softcap: float, rows: int
) -> list[Tensor]:
    """Losses of each chunk; with gradients, a chunk's logits are computed again in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    def losses(x: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        logits = softcap * torch.tanh((x @ weight[:vocab_size].to(x.dtype).t()).float() / softcap)
        return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="none")

    run: Callable[..., Any] = losses
    if torch.is_grad_enabled():
        run = lambda *inputs: checkpoint(losses, *inputs, use_reentrant=False)  # noqa: E731
    return [run(x_, t_, weight) for x_, t_ in zip(x.split(rows), targets.split(rows), strict=True)]


class _SummedLoss(torch.autograd.Function):
    """The sum of all losses. Its gradients are made in the forward pass, chunk by chunk, while the logits are there.

    The sum has one gradient, a scalar; so the backward pass only multiplies, and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NC: Tensor, weight: Tensor, targets_N: Tensor, vocab_size: int, softcap: float, rows: int,
        learns: bool,
    ) -> Tensor:  # fmt: skip
        matrix_VC = weight[:vocab_size].to(x_NC.dtype)
        total = torch.zeros((), device=x_NC.device)
        # Without gradient where the head is frozen. Asked for outside: compiled, this function cannot tell.
        grad_weight = torch.zeros(weight.shape if learns else 0, dtype=torch.float32, device=x_NC.device)
        grads_x = []
        for x, targets in zip(x_NC.split(rows), targets_N.split(rows), strict=True):
            loss, grad_logits, scale = _loss_and_gradient(x @ matrix_VC.t(), targets, softcap)
            total = total + loss
            grads_x.append((grad_logits @ matrix_VC) * scale)
            if learns:
                grad_weight[:vocab_size] += grad_logits.t() @ (x * scale)
        ctx.save_for_backward(torch.cat(grads_x), grad_weight)
        ctx.weight_dtype, ctx.learns = weight.dtype, learns
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        (factor,) = gradients
        grad_x = (grad_x * factor).to(grad_x.dtype)
        grad_weight = (grad_weight * factor).to(ctx.weight_dtype) if ctx.learns else None
        return grad_x, grad_weight, None, None, None, None, None


def _loss_and_gradient(products: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss (fp32) of head products (n, V) before the cap, which it overwrites, and their gradient.

    The gradient is the second result (n, V) times the third (n, 1): 4, or 0 where there is no target.
    """
    # tanh(x) = 2 sigmoid(2 x) - 1, which takes an exponential where tanh takes many operations.
    half = products.float().mul_(2 / softcap).sigmoid_()
    # Without the -1, which softmax does not see. No probability vanishes: the cap bounds the logits.
    probabilities = (2 * softcap * half).softmax(dim=-1)
    is_target = (targets >= 0)[:, None]
    index = targets.clamp(min=0)[:, None]
    loss = -torch.where(is_target, probabilities.gather(1, index).log(), 0.0).sum()
    if torch.compiler.is_compiling():
        # A scatter would not fuse, and write all probabilities to memory in between.
        is_chosen = torch.arange(products.size(1), device=products.device) == index
        error = probabilities - is_chosen.float()
    else:
        error = probabilities.scatter_add_(1, index, probabilities.new_full((1, 1), -1.0).expand_as(index))
    slope = torch.addcmul(half, half, half, value=-1)  # of the cap, over 4
    return loss, error.mul_(slope).to(products.dtype), (4.0 * is_target).to(products.dtype)
