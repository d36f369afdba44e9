"""nanochat's network beyond the classic architecture, as remote code for transformers.

This file is copied into exported folders and stands alone: `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)` runs it. It follows nanochat/gpt.py of the repository that exported the folder; the
export compares both before it finishes. MIT licence.

On top of RoPE, QK norm, grouped queries, ReLU^2 and norms without parameters, each part behind a setting:
sliding windows, residual scalars, value embeddings with gates, smear (each token takes in a gated part of its
predecessor's embedding) and backout (the middle layer's output is subtracted at the end).

B batch, T new tokens, C width, H heads, D head size.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SLIDING = ("sliding_attention", "hybrid_sliding")


class NanoChatModernConfig(PreTrainedConfig):
    """Sizes and architecture.

    layer_types says which layers see `sliding_window` tokens (their own included) and which see all. With
    smear the first one is a hybrid: its part of the cache also keeps the last token's embedding.
    """

    model_type = "nanochat_modern"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012, transformers' convention

    vocab_size: int = 32768
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_key_value_heads: int = 6
    max_position_embeddings: int = 2048
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    rope_base: float = 100_000.0
    rope_dtype: str | None = None  # None: the dtype of the activations
    qk_scale: float = 1.2
    rms_norm_eps: float = 2.0**-23
    final_logit_softcapping: float = 15.0
    use_lambdas: bool = True
    use_value_embeds: bool = True
    ve_gate_channels: int = 12
    ve_gate_scale: float = 3.0
    use_smear: bool = True
    smear_channels: int = 24
    use_backout: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.layer_types is None:
            first = "hybrid" if self.use_smear else "full_attention"
            self.layer_types = [first, *["full_attention"] * (self.num_hidden_layers - 1)]
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def is_sliding(self, layer: int) -> bool:
        """Whether a layer sees only the last `sliding_window` tokens."""
        return self.layer_types is not None and self.layer_types[layer] in SLIDING

    def has_value_embed(self, layer: int) -> bool:
        """Every second layer, counted from the last one."""
        return self.use_value_embeds and layer % 2 == (self.num_hidden_layers - 1) % 2


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions by -phi on (B, H, T, D), first half of D paired with the second."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; query (B, H, T, D), output (B, T, H, D) and weights."""
    groups = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    is_causal = True

    def __init__(self, config: NanoChatModernConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.sliding_window = config.sliding_window if config.is_sliding(layer_idx) else None
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        if config.has_value_embed(layer_idx):
            self.ve_gate = nn.Linear(config.ve_gate_channels, config.num_key_value_heads, bias=False)

    def forward(self, x, value_embed, cos, sin, attention_mask, past_key_values, **kwargs) -> torch.Tensor:
        config, (B, T, _) = self.config, x.shape
        q, k, v = (
            c(x).view(B, T, -1, self.head_dim).transpose(1, 2)
            for c in (self.q_proj, self.k_proj, self.v_proj)
        )
        if value_embed is not None:
            gate = config.ve_gate_scale * torch.sigmoid(self.ve_gate(x[..., : config.ve_gate_channels]))
            extra = gate.unsqueeze(-1) * value_embed.view(B, T, -1, self.head_dim)
            v = v + extra.transpose(1, 2)
        q, k = (F.rms_norm(rotate(h, cos, sin), (self.head_dim,), eps=config.rms_norm_eps) for h in (q, k))
        q, k = q * config.qk_scale, k * config.qk_scale
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            config._attn_implementation or "eager", eager_attention
        )
        y, _ = attend(
            self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, sliding_window=self.sliding_window,
            **kwargs,
        )  # fmt: skip
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: NanoChatModernConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(x)).square())


class DecoderLayer(nn.Module):
    def __init__(self, config: NanoChatModernConfig, layer_idx: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        x = x + self.self_attn(F.rms_norm(x, x.shape[-1:], eps=self.eps), *args, **kwargs)
        return x + self.mlp(F.rms_norm(x, x.shape[-1:], eps=self.eps))


class NanoChatModernPreTrainedModel(PreTrainedModel):
    config: NanoChatModernConfig
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012, transformers' convention
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # They multiply activations of any dtype; rounding them to bf16 would change every layer.
    _keep_in_fp32_modules_strict = ["resid_lambdas", "x0_lambdas"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        neutral = {"resid_lambdas": 1.0, "x0_lambdas": 0.0, "smear_lambda": 0.0, "backout_lambda": 0.0}
        for name, value in neutral.items():
            if isinstance(parameter := getattr(module, name, None), nn.Parameter):
                nn.init.constant_(parameter, value)


class NanoChatModernModel(NanoChatModernPreTrainedModel):
    """Token ids to the final normalised residual stream."""

    def __init__(self, config: NanoChatModernConfig) -> None:
        super().__init__(config)
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.value_embeds = nn.ModuleDict(
            {
                str(i): nn.Embedding(config.vocab_size, kv_width)
                for i in range(config.num_hidden_layers)
                if config.has_value_embed(i)
            }
        )
        if config.use_lambdas:
            self.resid_lambdas = nn.Parameter(torch.ones(config.num_hidden_layers))
            self.x0_lambdas = nn.Parameter(torch.zeros(config.num_hidden_layers))
        if config.use_smear:
            self.smear_gate = nn.Linear(config.smear_channels, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.use_backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        config, eps = self.config, self.config.rms_norm_eps
        if input_ids is None:
            raise ValueError("nanochat needs input_ids: value embeddings are looked up by token")
        if past_key_values is None and (config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=config)
        x = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = self._positions(x, attention_mask, past_key_values)
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = self.create_masks_for_generate(config, x, attention_mask, past_key_values, position_ids)
        cos, sin = self._rotary(position_ids, x.dtype)

        x = F.rms_norm(x, x.shape[-1:], eps=eps)
        if config.use_smear:
            x = self._smear(x, position_ids, past_key_values)
        x0 = middle = x
        for i, layer in enumerate(self.layers):
            if config.use_lambdas:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            embed = self.value_embeds[str(i)](input_ids) if config.has_value_embed(i) else None
            kind = "sliding_attention" if config.is_sliding(i) else "full_attention"
            x = layer(x, embed, cos, sin, masks[kind], past_key_values, **kwargs)
            if i == config.num_hidden_layers // 2:
                middle = x
        if config.use_backout:
            x = x - self.backout_lambda * middle
        x = F.rms_norm(x, x.shape[-1:], eps=eps)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs
    ) -> dict[str, torch.Tensor | None]:
        """One mask per kind of attention; `generate` makes them ahead of a compiled forward pass."""
        given = (config, inputs_embeds, attention_mask, past_key_values, position_ids)
        masks = {}
        sliding = [config.is_sliding(layer) for layer in range(config.num_hidden_layers)]
        if not all(sliding):
            masks["full_attention"] = create_causal_mask(*given)
        if any(sliding):
            masks["sliding_attention"] = create_sliding_window_causal_mask(*given)
        return masks

    def _positions(
        self, x: torch.Tensor, mask: torch.Tensor | dict | None, cache: Cache | None
    ) -> torch.Tensor:
        """(B or 1, T) positions, counted from each row's first real token if there is a mask of padding."""
        T = x.size(1)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -T:]
        past = 0 if cache is None else cache.get_seq_length()
        return (torch.arange(T, device=x.device) + past).unsqueeze(0)

    def _rotary(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (B or 1, 1, T, D/2); computed anew, which costs less than a table to keep in step."""
        config = self.config
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device)
        frequency = 1.0 / (config.rope_base ** (half / config.head_dim))
        angle = position_ids[:, None, :, None].float() * frequency
        if config.rope_dtype is not None:
            rounded = getattr(torch, config.rope_dtype)
            return angle.cos().to(rounded).to(dtype), angle.sin().to(rounded).to(dtype)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def _smear(self, x: torch.Tensor, position_ids: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """Add a gated part of the predecessor's embedding; a row's first real token (position 0) has none."""
        columns = x.transpose(1, 2)
        if cache is not None:
            columns = cache.update_conv_state(
                columns, 0, conv_kernel_size=1
            )  # what it kept, then the new ones
        previous = F.pad(columns, (1, 0))[..., -x.size(1) - 1 : -1].transpose(1, 2)
        previous = previous * (position_ids != 0).unsqueeze(-1).to(x.dtype)
        gate = self.smear_lambda * torch.sigmoid(self.smear_gate(x[..., : self.config.smear_channels]))
        return x + gate * previous


class NanoChatModernForCausalLM(NanoChatModernPreTrainedModel, GenerationMixin):
    """Token ids to logits, and to the loss where labels are given (-100 = not a target)."""

    create_masks_for_generate = staticmethod(NanoChatModernModel.create_masks_for_generate)

    def __init__(self, config: NanoChatModernConfig) -> None:
        super().__init__(config)
        self.model = NanoChatModernModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        found = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, keep]).float()
        cap = self.config.final_logit_softcapping
        logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=found.past_key_values)
