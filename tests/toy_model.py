"""Small stand-ins for tests of generation: a byte tokenizer, a scripted network, and a random real one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from nanochat.answer_parts import PartsDecoder
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import KVCache
from nanochat.page_pool import PagePool
from nanochat.prefix_store import PrefixStore
from nanochat.row_cache import RowCache
from nanochat.tokenizer import SPECIAL_TOKENS
from nanochat.tokenizer_base import Tokenizer

VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


class ByteTokenizer:
    """Ids 0 to 255 are bytes, the special tokens follow."""

    def encode_special(self, text: str) -> int:
        return 256 + SPECIAL_TOKENS.index(text)

    def get_special_tokens(self) -> set[str]:
        return set(SPECIAL_TOKENS)

    def get_bos_token_id(self) -> int:
        return 256

    def get_vocab_size(self) -> int:
        return VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.decode_single_token_bytes, ids)).decode("utf-8", "replace")

    def decode_single_token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else SPECIAL_TOKENS[token - 256].encode()

    def render_conversation(self, conversation, max_tokens=2048):
        from nanochat.conversation import render

        return render(conversation, self.encode, self.encode_special, max_tokens)


def answer_text(tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The text of a whole answer without calls and results, up to the first stop string."""
    decoder = PartsDecoder(tokenizer, stop)
    for token in tokens:
        decoder.push(token)
    decoder.flush()
    return decoder.response


class ScriptedModel:
    """A "network" whose next token is a function of all tokens of its row, remembered in the cache alone.

    Every forward pass writes the ids into the cache and reads the history back from it, so that rows that
    are mixed up, lost or overwritten show.
    """

    def __init__(self, next_token: Callable[[list[int]], int | None], sequence_len: int = 128) -> None:
        self.config = GPTConfig.classic(
            sequence_len=sequence_len, vocab_size=VOCAB_SIZE, n_layer=1, n_head=1, n_kv_head=1, n_embd=2
        )
        self.compute_dtype = torch.float32
        self.next_token = next_token
        self.calls: list[tuple[int, int]] = []  # rows and width of each forward pass

    def get_device(self) -> torch.device:
        return torch.device("cpu")

    def forward(
        self,
        ids: torch.Tensor,
        kv_cache: KVCache,
        lengths: Sequence[int] | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        self.calls.append((ids.size(0), ids.size(1)))
        chunk = kv_cache.begin(ids.size(1), lengths)
        keys = ids[:, :, None, None].float().expand(-1, -1, 1, 2)
        kv_cache.insert(0, chunk, keys, keys)
        seen, _ = kv_cache.visible(0, chunk)
        kv_cache.advance(chunk.lengths)
        width = 1 if last_only else ids.size(1)
        logits = torch.zeros(ids.size(0), width, VOCAB_SIZE)
        for row, position in enumerate(kv_cache.positions):
            history = seen[row, :position, 0, 0].int().tolist()
            for back in range(width):
                token = self.next_token(history[: len(history) - back])
                if token is not None:  # None: every token is equally likely
                    logits[row, -1 - back] = -1e9
                    logits[row, -1 - back, token] = 0
        return logits


def scripted(answers: dict[str, list[int | str]], sequence_len: int = 128) -> ScriptedModel:
    """A model that answers each prompt text with a fixed list of ids or text, then <|assistant_end|>."""
    tokenizer = ByteTokenizer()

    def flat(answer: list[int | str]) -> list[int]:
        ids: list[int] = []
        for piece in answer:
            special = isinstance(piece, str) and piece in SPECIAL_TOKENS
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += [tokenizer.encode_special(piece)] if special else tokenizer.encode(piece)
        return [*ids, tokenizer.encode_special("<|assistant_end|>")]

    table = {tuple(tokenizer.encode(prompt)): flat(answer) for prompt, answer in answers.items()}

    def next_token(history: list[int]) -> int:
        prompt = next(p for p in table if tuple(history[: len(p)]) == p)
        return table[prompt][min(len(history) - len(prompt), len(table[prompt]) - 1)]

    return ScriptedModel(next_token, sequence_len)


def random_model(architecture: str = "modern", seed: int = 0, **sizes) -> GPT:
    """A real network of random weights, none of them zero."""
    defaults = dict(sequence_len=64, vocab_size=VOCAB_SIZE, n_layer=4, n_head=4, n_kv_head=2, n_embd=64)
    config = getattr(GPTConfig, architecture)(**{**defaults, **sizes})
    torch.manual_seed(seed)
    model = GPT(config)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3 if parameter.dim() < 2 else 0.15)
    return model.eval()


def opinionated_network() -> GPT:
    """A tiny network with weights large enough to have opinions."""
    torch.manual_seed(0)
    config = GPTConfig.modern(sequence_len=256, vocab_size=257, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    network = GPT(config)
    network.init_weights()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network.eval()


def begun_cache(model: GPT, rows: int, tokens: int, width: int = 16) -> RowCache:
    """Empty rows that have pages for so many tokens each."""
    cache = RowCache(model, rows, PagePool(model, 1 << 30, width))
    wanted = [tokens] * rows
    cache.pool.ensure(cache.missing(wanted))
    for _ in wanted:
        cache.add_row()
    cache.extend(wanted)
    return cache


def row_contents(cache: RowCache, row: int) -> list[torch.Tensor]:
    """Keys and values (tokens, H, D) of each layer that a row still holds, in the order of its slots."""
    pool, filled = cache.pool, cache.positions[row]
    tensors = []
    for layer, (keys, values) in enumerate(zip(pool.keys, pool.values, strict=True)):
        pages = torch.from_numpy(cache.tables[pool.group_of[layer]][row].astype(np.int64))
        tensors += [all_[pages].flatten(0, 1)[:filled] for all_ in (keys, values)]
    return tensors


def check_pages(pool: PagePool) -> None:
    """Every page is held by as many as say so, or free; all take what is said and no more than is allowed."""
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*pool.keys, *pool.values))
    assert held == pool.nbytes <= pool.max_bytes
    for number, group in enumerate(pool.groups):
        uses = np.zeros(group.capacity, int)
        uses[:1] = 1
        for holder in pool._holders:
            if isinstance(holder, RowCache):
                assert not holder.tables[number][len(holder.positions) :].any()
                for row, count in enumerate(holder._held[number][: len(holder.positions)]):
                    pages = holder.tables[number][row]
                    assert pages[:count].all() and not pages[count:].any()
                    np.add.at(uses, pages[:count], 1)
            elif isinstance(holder, PrefixStore):
                np.add.at(uses, np.array([block[number] for block in holder._blocks.values()], int), 1)
        assert uses.tolist() == group.uses.tolist()
        assert sorted(group.free) == np.flatnonzero(uses == 0).tolist()
