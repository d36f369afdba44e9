"""Configurations and weight names of our network in transformers' terms, both ways.

A classic network is transformers' own NanoChatForCausalLM; every other one is the model of
modeling_nanochat_modern.py. Nothing may get lost: a setting or a tensor without a counterpart is a UserError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from nanochat.common import UserError
from nanochat.config_versions import read_config, stored_config
from nanochat.gpt import NORM_EPS, SMEAR_CHANNELS, GPTConfig
from nanochat.interop.weights import SIZE_LIMIT, SIZES, fitted, fp32, is_vocabulary_table

CLASSIC_TYPE, MODERN_TYPE = "nanochat", "nanochat_modern"
OWN_SETTINGS = "nanochat_config"  # our configuration as it is, beside its translation
REMOTE_MODULE = "modeling_nanochat_modern"

_LAYER_NAMES = {
    "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj", "attn.ve_gate": "self_attn.ve_gate",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
_TOP_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight",
    **{
        name: f"model.{name}"
        for name in ("resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda", "backout_lambda")
    },
}  # fmt: skip


# --- configuration -----------------------------------------------------------------------------------


def is_classic(config: GPTConfig) -> bool:
    """Whether transformers' NanoChatForCausalLM computes this network (RoPE base and softcap are free)."""
    full = all(window >= config.sequence_len for window in config.window_sizes)
    extras = (config.use_lambdas, config.use_value_embeds, config.use_smear, config.use_backout)
    return full and not any(extras) and config.qk_scale == 1 and config.rope_dtype == "compute"


def to_hf_config(config: GPTConfig) -> dict[str, Any]:
    """The content of config.json, without the ids of special tokens. The head gets weights of its own."""
    config = replace(config, tie_embeddings=False)
    common = {
        "vocab_size": config.vocab_size, "hidden_size": config.n_embd, "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head, "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": NORM_EPS, "final_logit_softcapping": config.logit_softcap, "tie_word_embeddings": False,
        "use_cache": True, "dtype": "float32", OWN_SETTINGS: stored_config(config),
    }  # fmt: skip
    if is_classic(config):
        return {
            "model_type": CLASSIC_TYPE, "architectures": ["NanoChatForCausalLM"], "hidden_act": "relu2",
            "attention_bias": False, "attention_dropout": 0.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base}, **common,
        }  # fmt: skip
    full, windows = config.sequence_len, config.window_sizes
    kinds = ["full_attention" if window >= full else "sliding_attention" for window in windows]
    if config.use_smear:  # its cache also keeps the last embedding
        kinds[0] = {"full_attention": "hybrid", "sliding_attention": "hybrid_sliding"}[kinds[0]]
    return {
        "model_type": MODERN_TYPE, "architectures": ["NanoChatModernForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{REMOTE_MODULE}.NanoChatModernConfig",
            "AutoModelForCausalLM": f"{REMOTE_MODULE}.NanoChatModernForCausalLM",
        },
        "layer_types": kinds,
        "sliding_window": min(windows) + 1 if min(windows) < full else None,  # theirs counts the token itself
        "rope_base": config.rope_base, "rope_dtype": None if config.rope_dtype == "compute" else config.rope_dtype,
        "qk_scale": config.qk_scale, "use_lambdas": config.use_lambdas,
        "use_value_embeds": config.use_value_embeds, "ve_gate_channels": config.ve_gate_channels,
        "ve_gate_scale": config.ve_gate_scale, "use_smear": config.use_smear, "smear_channels": SMEAR_CHANNELS,
        "use_backout": config.use_backout, **common,
    }  # fmt: skip


def from_hf_config(content: Mapping[str, Any]) -> GPTConfig:
    """Our configuration of a config.json. Raises UserError if it is another network or changes ours."""
    kind = content.get("model_type")
    if kind not in (CLASSIC_TYPE, MODERN_TYPE):
        raise UserError(f"model_type {kind!r} is not a NanoChat model; only those can become our checkpoints")
    own = content.get(OWN_SETTINGS)
    if isinstance(own, dict):
        config = read_config(own)
    elif kind == CLASSIC_TYPE:
        config = _classic_from_hf(content)
    else:
        raise UserError(f"config.json lacks {OWN_SETTINGS}, which every export of a modern model holds")
    if any(getattr(config, name) >= SIZE_LIMIT for name in SIZES):
        raise UserError("config.json holds impossible sizes")
    # Somebody may have edited either half; what transformers computes and what we would compute must agree.
    wanted = to_hf_config(config)
    names = [name for name in wanted if name not in ("dtype", "architectures", "auto_map", OWN_SETTINGS)]
    heads, cap = content.get("num_key_value_heads"), content.get("logits_soft_cap", 15.0)  # an older name
    given = {
        "final_logit_softcapping": cap, **content, "rope_parameters": _rope(content),
        "num_key_value_heads": heads or content.get("num_attention_heads"),
    }  # fmt: skip
    # eps 1e-6, theirs by default, and 2^-23 give the same logits to 1e-5
    close = {"rms_norm_eps": (NORM_EPS, 1e-6), "use_cache": (True, False, None)}
    wrong = [
        f"{name} is {given.get(name)!r} where nanochat needs {wanted[name]!r}"
        for name in names
        if given.get(name, wanted[name]) not in close.get(name, (wanted[name],))
    ]
    if wrong:
        raise UserError(f"config.json is not a network that nanochat computes: {'; '.join(wrong)}")
    return config


def _classic_from_hf(content: Mapping[str, Any]) -> GPTConfig:
    cap = content.get("final_logit_softcapping", content.get("logits_soft_cap", 15.0))  # older name
    try:
        heads = content["num_attention_heads"]
        return GPTConfig.classic(
            sequence_len=content["max_position_embeddings"], vocab_size=content["vocab_size"],
            n_layer=content["num_hidden_layers"], n_head=heads,
            n_kv_head=content.get("num_key_value_heads") or heads, n_embd=content["hidden_size"],
            rope_base=float(_rope(content)["rope_theta"]), logit_softcap=float(cap),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"config.json is incomplete: {error!r}") from None


def _rope(content: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings as transformers reads them: under two names, the older one first, or as numbers beside."""
    given = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise UserError(f"config.json holds no RoPE settings but {given!r}")
    beside = {"rope_theta": content.get("rope_theta", 10_000.0)}
    if (factor := content.get("partial_rotary_factor")) is not None:
        beside["partial_rotary_factor"] = factor
    settings = {"rope_type": given.get("type", "default"), **beside, **given}
    settings.pop("type", None)  # the older name of rope_type
    return settings


# --- weights -----------------------------------------------------------------------------------------


def hf_name(name: str) -> str:
    """What a tensor of our state dict is called there. Raises UserError if it has no counterpart."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    if re.fullmatch(r"value_embeds\.\d+\.weight", name):
        return f"model.{name}"
    layer = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.weight", name)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight"
    raise UserError(f"{name} has no counterpart in transformers' model; nothing was written")


def to_hf_state(state: Mapping[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    """Tensors in fp32 under transformers' names, without the rows that pad the vocabulary."""
    result = {}
    for name, tensor in state.items():
        rows = tensor[: config.vocab_size] if is_vocabulary_table(name) else tensor
        result[hf_name(name)] = fp32(name, rows).contiguous()
    if config.tie_embeddings:
        result[_TOP_NAMES["lm_head.weight"]] = result[_TOP_NAMES["lm_head.weight"]].clone()
    return result


def from_hf_state(state: Mapping[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    """Tensors in fp32 under our names. Raises UserError if any is missing, left over or of another shape."""
    return fitted(state, config, hf_name)


def without_rounded_rope(config: GPTConfig) -> GPTConfig:
    """The same network with rotary tables in the dtype of the activations, as transformers computes them."""
    return replace(config, rope_dtype="compute")


def describe(config: GPTConfig) -> str:
    """A network in one line."""
    kind = "classic" if is_classic(config) else "modern"
    sizes = asdict(config)
    return (
        f"{kind}, {sizes['n_layer']} layers, width {sizes['n_embd']}, {sizes['n_head']} heads"
        f" ({sizes['n_kv_head']} for keys and values), vocabulary {sizes['vocab_size']:,},"
        f" context {sizes['sequence_len']:,}"
    )
