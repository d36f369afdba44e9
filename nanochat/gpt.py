"""The network, in two architectures from one set of parts.

classic: rotary positions, QK norm, grouped queries, ReLU^2, untied embeddings, norms without parameters.
modern:  classic plus sliding windows, residual scalars, value embeddings, smear and backout.

B batch, T time, C width (n_embd), H heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat.common import ROTARY_FACTOR
from nanochat.flash_attention import cached_attention, causal_attention
from nanochat.head_loss import head_loss
from nanochat.head_products import fp32_products
from nanochat.kv_cache import Cache, Chunk, ContextOverflow
from nanochat.network_config import SMEAR_CHANNELS, GPTConfig
from nanochat.sizing import flops_per_token, parameters

if TYPE_CHECKING:
    from nanochat.common import World
    from nanochat.optim import MuonAdamW

NORM_EPS = 2.0**-23  # torch's default, fixed here because older releases used the input dtype's epsilon


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMS norm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions by -phi on (B, T, H, D), first half of D paired with the second."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


class Linear(nn.Linear):
    """A matrix kept in fp32 and multiplied in the dtype of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        pass  # init_weights or a checkpoint sets the values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def in_fp32(self, x: torch.Tensor) -> torch.Tensor:
        """The products of x and the weight, summed and returned in fp32; without gradients."""
        return fp32_products(x, self.weight)


class Embedding(nn.Embedding):
    """A table of vectors, one per token."""

    def reset_parameters(self) -> None:
        pass  # init_weights or a checkpoint sets the values


@dataclass
class Context:
    """What one forward pass shares between its layers."""

    cos: torch.Tensor
    sin: torch.Tensor
    cache: Cache | None = None
    chunk: Chunk | None = None


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window, self.head_dim = layer, config.window_sizes[layer], config.head_dim
        self.qk_scale, self.gate_channels = config.qk_scale, config.ve_gate_channels
        self.gate_scale = config.ve_gate_scale
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.kv_width)
        self.c_v = Linear(config.n_embd, config.kv_width)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        if config.has_value_embed(layer):
            self.ve_gate = Linear(config.ve_gate_channels, config.n_kv_head)

    def forward(self, x: torch.Tensor, value_embed: torch.Tensor | None, context: Context) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (c(x).view(B, T, -1, self.head_dim) for c in (self.c_q, self.c_k, self.c_v))
        if value_embed is not None:
            gate = self.gate_scale * torch.sigmoid(self.ve_gate(x[..., : self.gate_channels]))
            v = v + gate.unsqueeze(-1) * value_embed.view_as(v)
        q, k = (norm(rotate(h, context.cos, context.sin)) for h in (q, k))
        if self.qk_scale != 1:
            q, k = q * self.qk_scale, k * self.qk_scale
        cache, chunk = context.cache, context.chunk
        if cache is not None and chunk is not None:
            cache.insert(self.layer, chunk, k, v)
        # What starts a cache is a sequence like any other: its padding is at the end, where no real position sees it.
        # Not so on a GPU, where trying the kernels of training would delay the first answer.
        if cache is None or chunk is None or (q.device.type == "cpu" and not any(chunk.start)):
            y = causal_attention(q, k, v, self.window)
        else:
            y = cached_attention(q, *cache.visible(self.layer, chunk), chunk.mask(self.window))
        return self.c_proj(y.reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, value_embed: torch.Tensor | None, context: Context) -> torch.Tensor:
        x = x + self.attn(norm(x), value_embed, context)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Token ids (B, T) to logits (B, T, V) or to a loss."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.recompute = False  # activations inside blocks: computed again in the backward pass, or kept
        vocab, width = config.padded_vocab_size, config.n_embd
        blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer = nn.ModuleDict({"wte": Embedding(vocab, width), "h": blocks})
        self.lm_head = Linear(width, vocab)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        if config.use_lambdas:
            self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        if config.use_smear:
            self.smear_gate = Linear(SMEAR_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.empty(1))
        if config.use_backout:
            self.backout_lambda = nn.Parameter(torch.empty(1))
        with_embed = filter(config.has_value_embed, range(config.n_layer))
        self.value_embeds = nn.ModuleDict({str(i): Embedding(vocab, config.kv_width) for i in with_embed})
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(0), persistent=False)

    # --- initialisation --------------------------------------------------------------------------

    @classmethod
    def build(cls, config: GPTConfig, device: torch.device | str, compute_dtype: torch.dtype) -> GPT:
        """Construct on the target device; weights are still undefined.

        Not by way of the meta device, whose first use imports torch's compiler: 5 s at every start.
        """
        with torch.device(device):
            model = cls(config, compute_dtype)
        model.init_rotary()
        if torch.device(device).type == "cuda" and compute_dtype == torch.bfloat16:
            if not config.tie_embeddings:  # the head is a matrix, which stays fp32
                model.wte.to(compute_dtype)  # halves the tables; fp16 could not be unscaled
            model.value_embeds.to(compute_dtype)
        return model

    @torch.no_grad()
    def init_weights(self, smear: float = 0.0) -> None:
        """Draw all parameters. smear: initial strength of the previous token in each token's embedding.

        wte N(0, 0.8) (classic 1); lm_head N(0, 0.001) unless it is wte; q, k, v uniform with std 1/sqrt(C);
        c_fc the same times 0.4 (classic 1); projections back into the residual stream 0; value embeddings as v;
        gates U(0, 0.02); resid_lambdas 1.15 to 1.05 and x0_lambdas 0.20 to 0.05 over the depth;
        backout_lambda 0.2. The order of draws is part of the format: all ranks seed alike.
        """
        config, modern = self.config, self.config.use_lambdas
        bound = (3.0 / config.n_embd) ** 0.5
        nn.init.normal_(self.wte.weight, std=0.8 if modern else 1.0)
        if not config.tie_embeddings:
            nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.blocks:
            for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                nn.init.uniform_(matrix.weight, -bound, bound)
            fc_bound = bound * (0.4 if modern else 1.0)
            nn.init.uniform_(block.mlp.c_fc.weight, -fc_bound, fc_bound)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
        if config.use_smear:
            nn.init.uniform_(self.smear_gate.weight, 0.0, 0.02)
            nn.init.constant_(self.smear_lambda, smear)
        for table in self.value_embeds.values():
            nn.init.uniform_(table.get_parameter("weight"), -bound, bound)
        for block in self.blocks:
            if hasattr(block.attn, "ve_gate"):
                nn.init.uniform_(block.attn.ve_gate.weight, 0.0, 0.02)
        if config.use_lambdas:
            depth = torch.arange(config.n_layer, device=self.get_device()) / max(config.n_layer - 1, 1)
            self.resid_lambdas.copy_(1.15 - 0.10 * depth)
            self.x0_lambdas.copy_(0.20 - 0.15 * depth)
        if config.use_backout:
            nn.init.constant_(self.backout_lambda, 0.2)
        self.init_rotary()

    def init_rotary(self) -> None:
        """Fill the rotary tables (1, 10 * sequence_len, 1, D/2)."""
        config, device = self.config, self.get_device()
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        frequency = 1.0 / (config.rope_base**half)
        position = torch.arange(ROTARY_FACTOR * config.sequence_len, dtype=torch.float32, device=device)
        angle = torch.outer(position, frequency)[None, :, None, :]
        cos, sin = angle.cos(), angle.sin()
        if config.rope_dtype == "bfloat16":
            cos, sin = cos.bfloat16(), sin.bfloat16()
        self.cos, self.sin = cos.to(self.compute_dtype), sin.to(self.compute_dtype)

    @property
    def blocks(self) -> Sequence[Block]:
        return self.transformer["h"]  # pyright: ignore[reportReturnType]

    @property
    def wte(self) -> nn.Embedding:
        return self.transformer["wte"]  # pyright: ignore[reportReturnType]

    def get_device(self) -> torch.device:
        return next(self.parameters()).device

    # --- forward ---------------------------------------------------------------------------------

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        kv_cache: Cache | None = None,
        loss_reduction: str = "mean",
        lengths: Sequence[int] | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Logits (B, T, V) in fp32, or the loss if targets (B, T) int64 are given (-1 = not a target).

        loss_reduction: "mean" over targets, "sum", or "none" for a flat (B*T,) vector.
        kv_cache: rows continue where they stand; `lengths` of the T tokens of each row are real (default all).
        last_only: logits (B, 1, V) of each row's last real position only.
        """
        x = self.hidden(idx, kv_cache, lengths)
        if last_only:
            x = _last_real(x, lengths)
        if targets is not None:
            return self._loss(x, targets, loss_reduction)
        return self.logits(x)

    def hidden(
        self, idx: torch.Tensor, kv_cache: Cache | None, lengths: Sequence[int] | None
    ) -> torch.Tensor:
        """Final normalised residual stream (B, T, C)."""
        config = self.config
        context = self._context(idx.size(1), kv_cache, lengths)
        x = self.embed(idx)
        if config.use_smear:
            x = self._smear(x, kv_cache, lengths)
        x0 = middle = x
        for layer, block in enumerate(self.blocks):
            if config.use_lambdas:
                x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            embed = self.value_embeds[str(layer)](idx).to(x.dtype) if config.has_value_embed(layer) else None
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, embed, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, embed, context)
            middle = x if layer == config.n_layer // 2 else middle
        if config.use_backout:
            x = x - self.backout_lambda.to(x.dtype) * middle
        if kv_cache is not None and context.chunk is not None:
            kv_cache.advance(context.chunk.lengths)
        return norm(x)

    def embed(self, idx: torch.Tensor) -> torch.Tensor:
        """Normalised embeddings (B, T, C) of tokens, before the smear; also the smear's state after them."""
        return norm(self.wte(idx).to(self.compute_dtype))

    def _context(self, width: int, cache: Cache | None, lengths: Sequence[int] | None) -> Context:
        table = self.cos.size(1)
        if cache is None:
            if width > table:
                raise ContextOverflow(f"{width} tokens exceed the rotary table of {table} positions")
            return Context(self.cos[:, :width], self.sin[:, :width])
        chunk = cache.begin(width, lengths)
        if chunk.total > table:
            raise ContextOverflow(f"position {chunk.total} exceeds the rotary table of {table} positions")
        if chunk.is_uniform:
            span = slice(chunk.start[0], chunk.total)
            return Context(self.cos[:, span], self.sin[:, span], cache, chunk)
        positions = chunk.positions()
        return Context(self.cos[0, positions], self.sin[0, positions], cache, chunk)

    def _smear(self, x: torch.Tensor, cache: Cache | None, lengths: Sequence[int] | None) -> torch.Tensor:
        """Mix a gated part of the previous token's embedding into each token's; position 0 has none."""
        if cache is None or cache.prev_embedding is None:
            previous = torch.zeros_like(x[:, :1])
        else:
            previous = cache.prev_embedding
        if cache is not None:
            cache.prev_embedding = _last_real(x, lengths).clone()
        shifted = torch.cat([previous, x[:, :-1]], dim=1)
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        return x + gate * shifted

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 (..., V) of final hidden states (..., C).

        Without gradients the head's products are not rounded to the dtype of x, which would make many of them equal:
        in bf16 they are 1/16 apart near 10. Adapters and other heads of training do round.
        In bf16 the last bits of x still depend on how many rows are computed together, except in the compiled step of
        processors. So only in fp32 and there does a seed give the same answer in every company.
        """
        cap = self.config.logit_softcap
        in_fp32 = None if torch.is_grad_enabled() else getattr(self.lm_head, "in_fp32", None)
        products = in_fp32(x) if in_fp32 else self.lm_head(x).float()
        return cap * torch.tanh(products[..., : self.config.vocab_size] / cap)

    def _loss(self, x: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        sizes = self.config.vocab_size, self.config.logit_softcap
        return head_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), *sizes, reduction)

    # --- accounting ------------------------------------------------------------------------------

    def num_scaling_params(self) -> dict[str, int]:
        """Parameters by kind; `transformer_matrices` + `lm_head` is the count that scaling laws use."""
        return parameters(self.config)

    def estimate_flops(self) -> int:
        """FLOPs per trained token, forward and backward."""
        return flops_per_token(self.config)

    # --- optimiser -------------------------------------------------------------------------------

    def setup_optimizer(
        self,
        world: World | None = None,
        unembedding_lr: float = 0.008,
        embedding_lr: float = 0.3,
        matrix_lr: float = 0.02,
        scalar_lr: float = 0.5,
        smear_lr: float = 0.2,
        weight_decay: float = 0.0,
    ) -> MuonAdamW:
        """AdamW for tables and scalars, Muon for the blocks' matrices; frozen parameters are left out.

        unembedding_lr: of the head, unless it is the input table.
        smear_lr: of the smear and of backout_lambda; upstream's constant, which no batch size scales.
        """
        from nanochat.optim import MuonAdamW
        from nanochat.parameter_groups import parameter_groups

        rates = (unembedding_lr, embedding_lr, matrix_lr, scalar_lr, smear_lr)
        groups = parameter_groups(self, *rates, weight_decay)
        return MuonAdamW(groups, world=world, compute_dtype=self.compute_dtype)

    # --- reference generation --------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self, tokens: list[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[int]:  # fmt: skip
        """Yield new token ids one by one, without a cache: slow, obvious, what the engine must equal."""
        ids = torch.tensor([tokens], dtype=torch.long, device=self.get_device())
        generator = torch.Generator(device=ids.device).manual_seed(seed)
        for _ in range(max_tokens):
            logits = self.forward(ids, last_only=True)[:, 0]
            if temperature == 0:
                chosen = logits.argmax(dim=-1, keepdim=True)
            else:
                if top_k:
                    least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -torch.inf)
                chosen = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
            yield int(chosen)
            ids = torch.cat([ids, chosen], dim=1)


def _last_real(x: torch.Tensor, lengths: Sequence[int] | None) -> torch.Tensor:
    """Each row's last real position of x (B, T, C) -> (B, 1, C)."""
    if lengths is None:
        return x[:, -1:]
    last = torch.as_tensor(lengths, device=x.device, dtype=torch.long) - 1
    return x[torch.arange(x.size(0), device=x.device), last][:, None]
