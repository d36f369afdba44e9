"""What earlier nanochat implementations computed, told from the names and shapes in their checkpoints.

Upstream's network changed several times while its checkpoints record only sizes, so the constants are inferred:

revision          since         told by                        constants
classic           Oct 13 2025   no residual scalars            RoPE base 10,000, rounded to bf16; every layer sees all
lambdas           Jan 11 2026   residual scalars alone         the same; windows where recorded
R2                Jan 16 2026   gates of 32 inputs             gate x2, short window = half the context
R2.5              Mar  9 2026   gates of 12 inputs             RoPE base 100,000, q and k x1.15, gate x3, a third
modern            Mar 14 2026   smear                          q and k x1.2, a quarter of the context

A softcap of 20 instead of 15 (Mar 2 to 9 2026) leaves no trace: whoever knows says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from nanochat.common import UserError
from nanochat.interop.weights import SIZE_LIMIT, SIZES, fitted
from nanochat.network_config import GPTConfig

_BEFORE_MARCH: dict[str, Any] = {
    "rope_base": 10_000.0, "rope_dtype": "bfloat16", "qk_scale": 1.0, "use_smear": False, "use_backout": False,
    "short_window_divisor": 2, "short_window_multiple": 1, "ve_gate_channels": 32, "ve_gate_scale": 2.0,
}  # fmt: skip


@dataclass(frozen=True)
class Migration:
    """An upstream network in our terms, and what had to be assumed about it, one sentence each."""

    config: GPTConfig
    state: dict[str, torch.Tensor]
    assumptions: tuple[str, ...]


def migrate(
    state: Mapping[str, torch.Tensor], model_config: Mapping[str, Any], softcap: float | None = None
) -> Migration:
    """Recognise the revision that wrote a checkpoint, and name and complete its parts as ours.

    state, model_config: the contents of model_*.pt and of meta_*.json under "model_config". The tensors become
    fp32. Raises UserError for what is no upstream checkpoint, or one of an experiment that is not supported.
    """
    notes: list[str] = []
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    if len(tensors) != len(state):
        raise UserError("the checkpoint holds tensors twice, with and without the prefix _orig_mod.")
    sizes, pattern = _sizes(model_config)
    revision, settings = _recognise(tensors, sizes, pattern, notes)
    cap = 15.0 if softcap is None else softcap
    if softcap is None:
        notes.append("logit softcap 15; only models trained Mar 2 to 9 2026 had 20 (--softcap=20)")
    config = GPTConfig(**{**sizes, **settings, "logit_softcap": cap})
    if revision != "classic" and "x0_lambdas" not in tensors:
        tensors["x0_lambdas"] = torch.zeros(config.n_layer)
        notes.append("x0_lambdas are missing and taken as 0, which is the network without them")
    weights = fitted(tensors, config)
    if tensors["lm_head.weight"].size(0) < config.padded_vocab_size:
        notes.append(
            f"vocabulary tables padded with zeros from {config.vocab_size:,} to {config.padded_vocab_size:,} rows"
        )
    return Migration(config, weights, tuple(notes))


def _sizes(model_config: Mapping[str, Any]) -> tuple[dict[str, int], str | None]:
    unknown = set(model_config) - {*SIZES, "window_pattern"}
    missing = [name for name in SIZES if name not in model_config]
    if unknown or missing:
        what = f"unknown settings {sorted(unknown)}" if unknown else f"no {', '.join(missing)}"
        raise UserError(f"the metadata is not upstream nanochat's: {what}")
    sizes = {name: model_config[name] for name in SIZES}
    pattern = model_config.get("window_pattern")
    if not all(type(size) is int and 0 < size < SIZE_LIMIT for size in sizes.values()):
        raise UserError(f"the metadata holds impossible sizes: {sizes}")
    if pattern is not None and not isinstance(pattern, str):
        raise UserError(f"the metadata holds an impossible window pattern: {pattern!r}")
    return sizes, pattern


def _recognise(
    tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int], pattern: str | None, notes: list[str]
) -> tuple[str, dict[str, Any]]:
    """The revision's name and the fields of GPTConfig that it fixes."""
    if any(name.startswith("bigram_") for name in tensors):
        raise UserError(
            "this checkpoint is of the bigram experiment of Jan 25 to 28 2026, which is not supported"
        )
    gates = {
        tensor.size(-1) if tensor.dim() else 0
        for name, tensor in tensors.items()
        if name.endswith("ve_gate.weight")
    }
    has_values = any(name.startswith("value_embeds.") for name in tensors)
    if has_values != bool(gates) or len(gates) > 1:
        raise UserError("value embeddings and their gates do not belong together; no revision wrote this")
    if "resid_lambdas" not in tensors:
        revision, settings = "classic", _BEFORE_MARCH | {"use_lambdas": False, "use_value_embeds": False}
    elif not has_values:
        revision, settings = "lambdas", _BEFORE_MARCH | {"use_value_embeds": False}
    elif gates == {32}:
        revision, settings = "R2", dict(_BEFORE_MARCH)
    elif gates == {12} and "smear_gate.weight" not in tensors:
        settings = {"qk_scale": 1.15, "use_smear": False, "use_backout": False, "short_window_divisor": 3}
        revision = "R2.5"
    elif gates == {12}:
        revision, settings = "modern", {}
    else:
        raise UserError(f"gates of {sorted(gates)} inputs; no revision had them")
    if pattern is None:
        pattern = "L"
        if revision != "classic":
            notes.append('no window pattern is recorded: every layer sees everything ("L")')
    if settings.get("short_window_divisor") == 2 and "S" in pattern.upper() and sizes["sequence_len"] % 2:
        raise UserError(f"half of a context of {sizes['sequence_len']} is not a window")
    notes.insert(0, _constants(revision, replace(GPTConfig(), **settings)))
    return revision, {**settings, "window_pattern": pattern}


def _constants(revision: str, config: GPTConfig) -> str:
    rounding = "rounded to bfloat16" if config.rope_dtype == "bfloat16" else "in the compute dtype"
    parts = [f"RoPE base {config.rope_base:,.0f}, tables {rounding}"]
    parts.append(f"q and k scaled by {config.qk_scale:g}")
    if config.use_value_embeds:
        parts.append(f"value gates of {config.ve_gate_channels} inputs times {config.ve_gate_scale:g}")
    if revision != "classic":
        parts.append(f"short window = context / {config.short_window_divisor}")
    return f"revision {revision}: {'; '.join(parts)}"
