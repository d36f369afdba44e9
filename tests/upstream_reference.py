"""Upstream's state dicts by revision, written down from their specification, and what they compute.

Independent of nanochat/gpt.py: the names, shapes and the forward pass are spelled out again, slowly and plainly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SIZES = dict(sequence_len=256, vocab_size=50, n_layer=3, n_head=4, n_kv_head=2, n_embd=64)
PADDED = 64
HEAD_DIM = 16
SCALARS = {"resid_lambdas": 1.0, "x0_lambdas": 0.1, "smear_lambda": 0.3, "backout_lambda": 0.2}


@dataclass(frozen=True)
class Revision:
    """The constants of one revision; `short` is the window of S layers at a context of 256."""

    lambdas: bool = False
    gate_channels: int = 0
    gate_scale: float = 0.0
    smear: bool = False
    base: float = 10_000.0
    round_tables: bool = True
    scale: float = 1.0
    short: int = 256
    pattern: str | None = "SL"
    softcap: float = 15.0


REVISIONS = {
    "classic": Revision(pattern=None),
    "lambdas": Revision(lambdas=True, short=128),
    "lambdas before windows": Revision(lambdas=True, pattern=None),
    "R2": Revision(lambdas=True, gate_channels=32, gate_scale=2.0, short=128),
    "R2 with softcap 20": Revision(lambdas=True, gate_channels=32, gate_scale=2.0, short=128, softcap=20.0),
    "R2.5": Revision(True, 12, 3.0, False, 100_000.0, False, 1.15, 128),
    "modern": Revision(True, 12, 3.0, True, 100_000.0, False, 1.2, 128),
}


def has_values(revision: Revision, layer: int) -> bool:
    return bool(revision.gate_channels) and layer % 2 == (SIZES["n_layer"] - 1) % 2


def shapes(revision: Revision) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict."""
    d, kv, layers = SIZES["n_embd"], SIZES["n_kv_head"] * HEAD_DIM, range(SIZES["n_layer"])
    found: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (PADDED, d), "lm_head.weight": (PADDED, d)}
    for i in layers:
        block = f"transformer.h.{i}"
        found |= {f"{block}.attn.c_q.weight": (d, d), f"{block}.attn.c_k.weight": (kv, d)}
        found |= {f"{block}.attn.c_v.weight": (kv, d), f"{block}.attn.c_proj.weight": (d, d)}
        found |= {f"{block}.mlp.c_fc.weight": (4 * d, d), f"{block}.mlp.c_proj.weight": (d, 4 * d)}
        if has_values(revision, i):
            found[f"{block}.attn.ve_gate.weight"] = (SIZES["n_kv_head"], revision.gate_channels)
            found[f"value_embeds.{i}.weight"] = (PADDED, kv)
    if revision.lambdas:
        found |= {"resid_lambdas": (len(layers),), "x0_lambdas": (len(layers),)}
    if revision.smear:
        found |= {"smear_gate.weight": (1, 24), "smear_lambda": (1,), "backout_lambda": (1,)}
    return found


def state_dict(revision: Revision) -> dict[str, torch.Tensor]:
    """Weights of the specification's formula."""
    state = {}
    for j, (name, shape) in enumerate(sorted(shapes(revision).items())):
        k = torch.arange(math.prod(shape), dtype=torch.float64)
        size = 1.0 if "wte" in name or "value_embeds" in name else 0.05 if name in SCALARS else 0.2
        values = SCALARS.get(name, 0.0) + size * torch.sin(0.7 * k * k + 1.3 * j + 0.5)
        state[name] = values.float().view(shape)
    return state


def model_config(revision: Revision) -> dict:
    """What upstream stores in meta_*.json."""
    return dict(SIZES) | ({} if revision.pattern is None else {"window_pattern": revision.pattern})


def norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 2.0**-23).sqrt()


def reference_logits(revision: Revision, state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of ids (T,), fp32."""
    T, layers = len(ids), SIZES["n_layer"]
    x = norm(state["transformer.wte.weight"][ids])
    if revision.smear:
        gate = state["smear_lambda"] * torch.sigmoid(x[1:, :24] @ state["smear_gate.weight"].T)
        x = torch.cat([x[:1], x[1:] + gate * x[:-1]])
    x0 = middle = x
    for i in range(layers):
        if revision.lambdas:
            x = state["resid_lambdas"][i] * x + state["x0_lambdas"][i] * x0
        pattern = revision.pattern or "L"
        is_short = pattern[i % len(pattern)] == "S" and i < layers - 1
        x = x + _attention(revision, state, i, norm(x), ids, revision.short if is_short else T)
        hidden = norm(x) @ state[f"transformer.h.{i}.mlp.c_fc.weight"].T
        x = x + hidden.clamp(min=0).square() @ state[f"transformer.h.{i}.mlp.c_proj.weight"].T
        middle = x if i == layers // 2 else middle
    if revision.smear:
        x = x - state["backout_lambda"] * middle
    logits = (norm(x) @ state["lm_head.weight"].T)[:, : SIZES["vocab_size"]]
    return revision.softcap * torch.tanh(logits / revision.softcap)


def _attention(revision, state, layer, x, ids, window) -> torch.Tensor:
    T, block = len(x), f"transformer.h.{layer}.attn"
    q, k, v = (
        (x @ state[f"{block}.{name}.weight"].T).view(T, -1, HEAD_DIM).transpose(0, 1)
        for name in ("c_q", "c_k", "c_v")
    )
    if has_values(revision, layer):
        gate = torch.sigmoid(x[:, : revision.gate_channels] @ state[f"{block}.ve_gate.weight"].T)
        embed = state[f"value_embeds.{layer}.weight"][ids].view(T, -1, HEAD_DIM)
        v = v + (revision.gate_scale * gate[:, :, None] * embed).transpose(0, 1)
    q, k = (revision.scale * norm(_rotated(revision, h)) for h in (q, k))
    groups = q.size(0) // k.size(0)
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    hidden = (distance < 0) | (distance > window)
    scores = (q @ k.transpose(1, 2) / HEAD_DIM**0.5).masked_fill(hidden, -math.inf)
    y = (F.softmax(scores, dim=-1) @ v).transpose(0, 1).reshape(T, -1)
    return y @ state[f"{block}.c_proj.weight"].T


def _rotated(revision: Revision, x: torch.Tensor) -> torch.Tensor:
    half = HEAD_DIM // 2
    angle = torch.arange(x.size(1)).float()[:, None] * revision.base ** (-torch.arange(half).float() / half)
    cos, sin = angle.cos(), angle.sin()
    if revision.round_tables:
        cos, sin = cos.bfloat16().float(), sin.bfloat16().float()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)
