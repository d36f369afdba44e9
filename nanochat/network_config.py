"""What a network is made of, without torch: its sizes, and the switches between the architectures."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nanochat.common import UserError

SMEAR_CHANNELS = 24
PAD_VOCAB_TO = 64


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and architecture of a network; defaults are the modern one. Stored in every checkpoint."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"
    rope_base: float = 100_000.0
    rope_dtype: str = "compute"  # "bfloat16" emulates the rounding of early checkpoints
    qk_scale: float = 1.2
    logit_softcap: float = 15.0
    short_window_divisor: int = 4
    short_window_multiple: int = 128
    use_lambdas: bool = True
    use_value_embeds: bool = True
    ve_gate_channels: int = 12
    ve_gate_scale: float = 3.0
    use_smear: bool = True
    use_backout: bool = True
    tie_embeddings: bool = False  # one table to read tokens and to write them

    @classmethod
    def modern(cls, **sizes) -> GPTConfig:
        return cls(**sizes)

    @classmethod
    def classic(cls, **sizes) -> GPTConfig:
        """What the Hugging Face NanoChat model implements."""
        plain = cls(
            window_pattern="L", rope_base=10_000.0, qk_scale=1.0, use_lambdas=False,
            use_value_embeds=False, use_smear=False, use_backout=False,
        )  # fmt: skip
        return replace(plain, **sizes)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            kind = type(getattr(GPTConfig, name))  # of the default
            fits = type(value) is kind or (kind is float and type(value) is int)
            if not fits or (kind in (int, float) and not 0 < value < math.inf):
                raise UserError(f"{name} cannot be {value!r}")
        if self.rope_dtype not in ("compute", "bfloat16"):
            raise UserError(f"rope_dtype {self.rope_dtype!r} is neither compute nor bfloat16")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.n_kv_head > self.n_head or self.n_head % self.n_kv_head:
            raise UserError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.head_dim % 2:
            raise UserError(f"head size {self.head_dim} must be even for rotary positions")
        if not self.window_pattern or set(self.window_pattern.upper()) - set("SL"):
            raise UserError(f"window_pattern {self.window_pattern!r} may hold only S and L")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_width(self) -> int:
        return self.n_kv_head * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // PAD_VOCAB_TO) * PAD_VOCAB_TO

    @property
    def window_sizes(self) -> list[int]:
        """Left window of each layer: the pattern repeated, but the last layer always sees everything."""
        part = -(-self.sequence_len // self.short_window_divisor)
        short = -(-part // self.short_window_multiple) * self.short_window_multiple
        sizes = {"S": short, "L": self.sequence_len}
        pattern = self.window_pattern.upper()
        windows = [sizes[pattern[i % len(pattern)]] for i in range(self.n_layer)]
        return [*windows[:-1], self.sequence_len]

    def has_value_embed(self, layer: int) -> bool:
        """Every second layer, counted so that the last one has a value embedding."""
        return self.use_value_embeds and layer % 2 == (self.n_layer - 1) % 2

    @property
    def num_value_embeds(self) -> int:
        return sum(map(self.has_value_embed, range(self.n_layer)))
