"""Small models with a real tokenizer, as the tests of interoperability need them."""

from __future__ import annotations

from functools import cache

import torch

from nanochat.gpt import GPT
from nanochat.samples import PARAGRAPHS
from nanochat.tokenizer import RustBPETokenizer
from tests.toy_model import random_model

VOCAB_SIZE = 390  # not a multiple of 64, so that tables are padded

# Each is another combination of what transformers' model or ours has to handle.
CLASSIC = {
    "grouped": dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=64),
    "ungrouped": dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=32),
    "one key head, other RoPE and cap": dict(n_layer=1, n_head=3, n_kv_head=1, n_embd=48, rope_base=5e4, logit_softcap=20.0),
}  # fmt: skip
_SHORT = dict(short_window_multiple=8, short_window_divisor=32)  # 8 tokens at a context of 256
MODERN = {
    "all features": dict(n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SSL", **_SHORT),
    "full windows": dict(n_layer=3, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L"),
    "no smear": dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL", use_smear=False, use_backout=False, qk_scale=1.15, **_SHORT),
    "lambdas alone": dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L", use_smear=False, use_backout=False, use_value_embeds=False, qk_scale=1.0, rope_dtype="bfloat16"),
}  # fmt: skip


@cache
def tokenizer() -> RustBPETokenizer:
    """A vocabulary learned from the sample paragraphs."""
    return RustBPETokenizer.train_from_iterator(iter(PARAGRAPHS * 3), VOCAB_SIZE)


def toy_model(name: str, seed: int = 0) -> GPT:
    """The named network with random weights."""
    architecture, sizes = ("classic", CLASSIC[name]) if name in CLASSIC else ("modern", MODERN[name])
    return random_model(architecture, seed, sequence_len=256, vocab_size=VOCAB_SIZE, **sizes)


def trained(model: GPT, steps: int = 30) -> GPT:
    """The model after some steps on the sample paragraphs, so that its weights are not random any more."""
    rows = [tokenizer().encode(text, prepend="<|bos|>")[:65] for text in PARAGRAPHS]
    ids = torch.tensor([row for row in rows if len(row) == 65])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids (rows, length), special tokens among them."""
    return torch.randint(VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))
