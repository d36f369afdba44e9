"""The engine's rows against the plain cache: rings, moves, blocks, memory."""

from __future__ import annotations

import random

import torch

from nanochat.kv_cache import KVCache
from nanochat.row_cache import BLOCK, RowCache
from tests.toy_model import random_model

torch.set_num_threads(1)
WIDTH = 16


def windowed_model():
    """Layers that see 8, 8 and 192 tokens back."""
    windows = dict(short_window_divisor=24, short_window_multiple=8)
    return random_model("modern", sequence_len=192, n_layer=3, n_embd=32, **windows)


def read(cache: RowCache, row: int, tokens: list[int], width: int = WIDTH) -> torch.Tensor:
    """Add tokens to a row in chunks; logits after the last."""
    logits = torch.empty(0)
    for start in range(0, len(tokens), width):
        logits = cache.forward(row, row + 1, torch.tensor([tokens[start : start + width]]))
    return logits[0]


@torch.inference_mode()
def test_rings_moves_and_blocks_equal_the_plain_cache():
    model, rng = windowed_model(), random.Random(0)
    texts = [rng.choices(range(256), k=n) for n in (150, 90, 40)]
    plain = []
    for text in texts:
        whole = KVCache(1, 2, 192, 8, 3)
        plain.append(model.forward(torch.tensor([text]), kv_cache=whole, last_only=True)[0, 0])

    cache = RowCache(model, 4, WIDTH)
    cache.reserve(4, 192, 1 << 30)
    assert [keys.size(1) for keys in cache.keys] == [64, 64, 192]
    rows = [cache.add_row() for _ in texts]
    blocks = []
    for row, text in zip(rows, texts, strict=True):
        for start in range(0, len(text) - 8, WIDTH):
            before = cache.positions[row]
            read(cache, row, text[:-8][start : start + WIDTH])
            if row == 0 and before // BLOCK != cache.positions[row] // BLOCK:
                blocks.append(cache.block(row, before // BLOCK))
    cache.swap_rows(0, 2)  # now 2, 1, 0
    assert cache.copy_row(2) == 3
    cache.remove_row(0)  # now 0, 1, 0
    assert cache.positions == [142, 82, 142]
    for row, text in ((0, 0), (1, 1), (2, 0)):
        assert torch.allclose(read(cache, row, texts[text][-8:]), plain[text], atol=1e-5)

    row = cache.add_row()
    assert len(blocks) == 4
    cache.load(row, blocks, texts[0][4 * BLOCK - 1])
    assert torch.allclose(read(cache, row, texts[0][4 * BLOCK :]), plain[0], atol=1e-5)


@torch.inference_mode()
def test_padding_in_a_ring_hides_nothing():
    """Rows of different lengths in one chunk, long after the ring has wrapped."""
    model, rng = windowed_model(), random.Random(1)
    texts = [rng.choices(range(256), k=n) for n in (123, 131)]
    cache = RowCache(model, 2, WIDTH)
    cache.reserve(2, 160, 1 << 30)
    for text in texts:
        read(cache, cache.add_row(), text[:120])
    padded = [texts[0][120:] + [0] * 8, texts[1][120:]]
    after = [cache.forward(0, 2, torch.tensor(padded), [3, 11])]
    after.append(cache.forward(0, 2, torch.tensor([[5] * 3, [6] * 3])))
    for row, text in enumerate(texts):
        logits = model.forward(torch.tensor([[*text, *[5 + row] * 3]]))[0]
        assert torch.allclose(after[0][row], logits[-4], atol=1e-5)
        assert torch.allclose(after[1][row], logits[-1], atol=1e-5)


def test_growing_uses_what_the_bound_allows_and_shrinking_gives_it_back():
    cache = RowCache(windowed_model(), 16, WIDTH)
    one = cache.bytes_for(1, 64)
    assert one == 2 * 3 * 64 * 2 * 8 * 4 and cache.nbytes == 0
    assert cache.bytes_for(1, 192) == one // 3 * (1 + 1 + 3), "two layers keep 64 slots"
    cache.reserve(2, 10, 100 * one)
    assert (cache.num_rows, cache.num_slots) == (2, 64)
    cache.reserve(3, 65, 100 * one)
    assert (cache.num_rows, cache.num_slots) == (4, 128), "doubled"
    cache.reserve(5, 65, 5 * cache.bytes_for(1, 128))
    assert (cache.num_rows, cache.num_slots) == (5, 128), "no room for more"
    cache.add_row()
    cache.shrink()
    assert cache.num_rows == 2
    cache.remove_row(0)
    cache.shrink()
    assert cache.nbytes == 0
