"""The two update rules as functions on tensors: AdamW, and Muon on stacks of equally shaped matrices.

Nothing here knows of ranks or parameter groups; that is optim.py. In shapes: K matrices, R rows, C columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Polynomial = tuple[float, float, float]  # x <- a x + b (x xT) x + c (x xT)^2 x

# Fixed quintic with maximal slope at zero; leaves singular values in about [0.5, 1.5]. [Jordan 2024]
NEWTON_SCHULZ: tuple[Polynomial, ...] = ((3.4445, -4.7750, 2.0315),) * 5
# Optimal quintic for each of five iterations, safety factor 2e-2, cushion 2. [Amsel 2025, arXiv 2505.16932]
POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@dataclass(frozen=True)
class MuonVariant:
    """What happens around the orthogonalisation. Each flag is one published change, so each can be ablated."""

    polynomials: tuple[Polynomial, ...] = POLAR_EXPRESS
    norm_margin: float = 1.01  # divides by this times the norm, so that rounding cannot push a value over 1
    norm_floor: float = 1e-6
    equalise_rows: bool = True  # MuonEq, arXiv 2603.28254
    unit_norm: bool = True  # Muon+, arXiv 2602.21545
    adapt_variance: bool = True  # NorMuon, arXiv 2510.05491


# Keys follow upstream's revisions: January 2026, February 2026, July 2026.
MUON_VARIANTS: dict[str, MuonVariant] = {
    "r1": MuonVariant(NEWTON_SCHULZ, 1.0, 1e-7, equalise_rows=False, unit_norm=False, adapt_variance=False),
    "r2": MuonVariant(norm_margin=1.02, equalise_rows=False, unit_norm=False),
    "r3": MuonVariant(),
}


@dataclass(frozen=True, slots=True)
class Guard:
    """Facts about the whole gradient, as 0-dim fp32 tensors on the device."""

    norm: Tensor
    scale: Tensor  # what gradients are multiplied by
    skip: Tensor  # 1 where the step must change nothing, else 0


def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    guard: Guard,
) -> None:
    """One AdamW step in place: decoupled decay, then moments, both bias-corrected. [Loshchilov 2019]

    The first four share shape and dtype; arithmetic is fp32 whatever they store. step: 0-dim fp32 on the same
    device.
    """
    step.add_(1.0 - guard.skip)
    # Torch's fused kernel passes over memory once; the same formula as separate operations passes nine times.
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        [param], [grad], [exp_avg], [exp_avg_sq], [], [step],
        lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
        grad_scale=1.0 / guard.scale, found_inf=guard.skip,
    )  # fmt: skip


def orthogonalise(x_KRC: Tensor, variant: MuonVariant, num_iterations: int) -> Tensor:
    """About the nearest semi-orthogonal matrix of each matrix in a stack: singular vectors kept, values near 1.

    Runs in the dtype of x_KRC. At most len(variant.polynomials) iterations.
    """
    norm_K11 = torch.linalg.vector_norm(x_KRC, dim=(-2, -1), keepdim=True)
    x = x_KRC / (variant.norm_margin * norm_K11 + variant.norm_floor)
    tall = x.size(-2) > x.size(-1)
    # The Gram matrix belongs on the short side; the copy makes it 2.5 times faster for tall bf16 on a CPU.
    x = x.mT.contiguous() if tall else x
    for a, b, c in variant.polynomials[:num_iterations]:
        gram = x @ x.mT
        # Fusing the sums into the products (baddbmm) is 20 % faster on a CPU, but rounds bf16 unlike upstream.
        square = gram @ gram
        polynomial = gram.mul_(b).add_(square, alpha=c)
        x = (polynomial @ x).add_(x.mul_(a))
    return x.mT.contiguous() if tall else x


def muon_update(
    params_KRC: Tensor,
    grads_KRC: Tensor,
    momentum_KRC: Tensor,
    second_moment: Tensor,
    lr: float | Tensor,
    momentum: float | Tensor,
    beta2: float | Tensor,
    weight_decay: float | Tensor,
    num_iterations: int,
    variant: MuonVariant,
    dtype: torch.dtype,
) -> None:
    """One Muon step in place on a stack of matrices, all fp32; grads_KRC is used up as working memory.

    second_moment: (K, R, 1) if R >= C else (K, 1, C). dtype: of the matrix products. With lr 0, momentum 1 and
    beta2 1 nothing changes, whatever the finite gradient.
    """
    num_rows, num_columns = params_KRC.shape[-2:]
    momentum_KRC.lerp_(grads_KRC, 1 - momentum)
    update = grads_KRC.lerp_(momentum_KRC, momentum).to(dtype)  # Nesterov: looks one step ahead
    if variant.equalise_rows:
        update = update.mul_(_row_equaliser(update))
    update = orthogonalise(update, variant, num_iterations)
    update = update.to(params_KRC.dtype)
    if variant.adapt_variance or variant.unit_norm:
        update = update.mul_(_rescaling(update, second_moment, beta2, variant))
    lr = lr * math.sqrt(max(1.0, num_rows / num_columns))
    # Decay only where it does not fight the update, by the weights before it. [Chen 2025, arXiv 2411.16085]
    decay = (update * params_KRC).ge_(0).mul_(params_KRC).mul_(lr * weight_decay)
    params_KRC.sub_(update.mul_(lr)).sub_(decay)


def _row_equaliser(x_KRC: Tensor) -> Tensor:
    """Factors that give every row the root mean square of all row norms."""
    row_norms = torch.linalg.vector_norm(x_KRC, dim=-1, keepdim=True, dtype=torch.float32)
    target = row_norms.square().mean(dim=-2, keepdim=True).sqrt()
    return (target / row_norms.clamp_min(1e-6)).to(x_KRC.dtype)


def _rescaling(x_KRC: Tensor, second_moment: Tensor, beta2: float | Tensor, variant: MuonVariant) -> Tensor:
    """Factors, fp32 and shaped like second_moment, for the unit norm and the variance reduction.

    Both only need the mean squares along one side, so the stack itself is read once and multiplied once.
    """
    num_rows, num_columns = x_KRC.shape[-2:]
    side = -1 if num_rows >= num_columns else -2
    length = x_KRC.size(side)
    mean_square = (
        torch.linalg.vector_norm(x_KRC, dim=side, keepdim=True, dtype=torch.float32).square() / length
    )
    norm = (length * mean_square.sum(dim=(-2, -1), keepdim=True)).sqrt()
    factor = torch.ones_like(norm)
    if variant.unit_norm:
        factor = math.sqrt(min(num_rows, num_columns)) / norm.clamp_min(1e-6)
        mean_square, norm = mean_square * factor.square(), norm * factor
    if not variant.adapt_variance:
        return factor
    second_moment.lerp_(mean_square, 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    scaled_norm = (length * (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True)).sqrt()
    return factor * scale * (norm / scaled_norm.clamp_min(1e-10))


def update_group(
    group: dict[str, Any],
    stack: Tensor,
    gradients: Tensor,
    buffers: list[Tensor],
    guard: Guard,
    compute_dtype: torch.dtype,
) -> None:
    """muon_update of a stack, in place, with a group's hyper-parameters; buffers: momentum, second moment."""
    lr, momentum, beta2 = (group[key] for key in ("lr", "momentum", "beta2"))
    gradients = torch.where(guard.skip > 0, 0.0, gradients * guard.scale)
    # Momentum and beta2 of 1 keep the buffers as they are.
    momentum, beta2 = (value + (1 - value) * guard.skip for value in (momentum, beta2))
    momentum_buffer, second_moment = buffers
    muon_update(
        stack, gradients, momentum_buffer, second_moment, lr * (1 - guard.skip), momentum, beta2, group["weight_decay"],
        group["ns_steps"], MUON_VARIANTS[group["variant"]],
        # fp16 has too little range for the iteration, so it runs in fp32 there.
        torch.bfloat16 if compute_dtype == torch.bfloat16 else torch.float32,
    )  # fmt: skip
