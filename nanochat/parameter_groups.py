"""Which optimizer trains which parameter, and how fast: AdamW for tables and scalars, Muon for matrices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from nanochat.gpt import GPT


def parameter_groups(
    model: GPT,
    unembedding_lr: float,
    embedding_lr: float,
    matrix_lr: float,
    scalar_lr: float,
    smear_lr: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Groups of all parameters that are not frozen, one per shape of matrix; rates as in GPT.setup_optimizer."""
    config = model.config
    width_scale = (config.n_embd / 768) ** -0.5  # tables learn slower in wider models
    table_lr = embedding_lr * width_scale
    groups = []
    if not config.tie_embeddings:
        groups.append(_adamw([model.lm_head.weight], unembedding_lr * width_scale, (0.8, 0.96), 0.01))
    groups.append(_adamw([model.wte.weight], table_lr, (0.8, 0.995), 0.001))
    if config.use_value_embeds:
        groups.append(_adamw(model.value_embeds.parameters(), 0.5 * table_lr, (0.8, 0.995), 0.01))
    if config.use_lambdas:
        groups.append(_adamw([model.resid_lambdas], 0.01 * scalar_lr, (0.8, 0.95), 0.05))
        groups.append(_adamw([model.x0_lambdas], scalar_lr, (0.96, 0.95), 0.0))
    rest = [model.smear_gate.weight, model.smear_lambda] if config.use_smear else []
    rest += [model.backout_lambda] if config.use_backout else []
    groups.append(_adamw(rest, smear_lr, (0.8, 0.95), 0.0))
    matrices = [matrix for block in model.blocks for matrix in block.parameters()]
    for shape in sorted({tuple(matrix.shape) for matrix in matrices}):
        same = [matrix for matrix in matrices if tuple(matrix.shape) == shape and matrix.requires_grad]
        muon = {"kind": "muon", "momentum": 0.95, "ns_steps": 5, "beta2": 0.9, "params": same}
        groups.append({**muon, "lr": matrix_lr, "weight_decay": weight_decay})
    groups = [group for group in groups if group["params"]]
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert sum(len(group["params"]) for group in groups) == trained
    return groups


def _adamw(
    params: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float
) -> dict[str, Any]:
    learning = [param for param in params if param.requires_grad]
    settings = {"kind": "adamw", "eps": 1e-10, "betas": betas, "weight_decay": weight_decay}
    return {**settings, "params": learning, "lr": lr}
