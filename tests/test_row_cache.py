"""The engine's rows against the plain cache: rings, moves, shared pages, blocks."""

from __future__ import annotations

import random

import torch

from nanochat.kv_cache import KVCache
from nanochat.page_pool import PAGE, PagePool
from nanochat.row_cache import RowCache
from tests.toy_model import begun_cache, check_pages, random_model

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


def grow(cache: RowCache, tokens: list[int]) -> None:
    """Give each row pages for so many tokens."""
    cache.pool.ensure(cache.missing(tokens))
    cache.extend(tokens)


@torch.inference_mode()
def test_rings_moves_and_blocks_equal_the_plain_cache():
    model, rng = windowed_model(), random.Random(0)
    texts = [rng.choices(range(256), k=n) for n in (150, 90, 40)]
    plain = []
    for text in texts:
        whole = KVCache(1, 2, 192, 8, 3)
        plain.append(model.forward(torch.tensor([text]), kv_cache=whole, last_only=True)[0, 0])

    cache = RowCache(model, 4, PagePool(model, 1 << 30, WIDTH))
    pool = cache.pool
    assert [pool.groups[number].ring for number in pool.group_of] == [2, 2, 60]
    for _ in texts:
        cache.add_row()
        grow(cache, [len(text) for text in texts[: len(cache.positions)]])
    blocks = []
    for row, text in enumerate(texts):
        for start in range(0, len(text) - 8, WIDTH):
            before = cache.positions[row]
            read(cache, row, text[:-8][start : start + WIDTH])
            if row == 0 and before // PAGE != cache.positions[row] // PAGE:
                pool.ensure(cache.block_copies)
                blocks += cache.blocks(row, [before // PAGE])
    cache.swap_rows(0, 2)  # now 2, 1, 0
    pool.ensure(cache.copies(2))
    used = [group.num_used for group in pool.groups]
    assert cache.copy_row(2) == 3
    assert [group.num_used for group in pool.groups] == [used[0] + 2, used[1] + 1], (
        "four whole pages are shared"
    )
    cache.remove_row(0)  # now 0, 1, 0
    assert cache.positions == [142, 82, 142]
    grow(cache, [150, 90, 150])
    for row, text in ((0, 0), (1, 1), (2, 0)):
        assert torch.allclose(read(cache, row, texts[text][-8:]), plain[text], atol=1e-5)

    row = cache.add_row()
    assert len(blocks) == 4
    pool.ensure(cache.missing([150, 90, 150, 150]))
    cache.load(row, blocks, texts[0][4 * PAGE - 1])
    grow(cache, [150, 90, 150, 150])
    assert torch.allclose(read(cache, row, texts[0][4 * PAGE :]), plain[0], atol=1e-5)


@torch.inference_mode()
def test_padding_in_a_ring_hides_nothing():
    """Rows of different lengths in one chunk, long after the ring has wrapped."""
    model, rng = windowed_model(), random.Random(1)
    texts = [rng.choices(range(256), k=n) for n in (123, 131)]
    cache = begun_cache(model, 2, 134)
    for row, text in enumerate(texts):
        read(cache, row, text[:120])
    padded = [texts[0][120:] + [0] * 8, texts[1][120:]]
    after = [cache.forward(0, 2, torch.tensor(padded), [3, 11])]
    after.append(cache.forward(0, 2, torch.tensor([[5] * 3, [6] * 3])))
    for row, text in enumerate(texts):
        logits = model.forward(torch.tensor([[*text, *[5 + row] * 3]]))[0]
        assert torch.allclose(after[0][row], logits[-4], atol=1e-5)
        assert torch.allclose(after[1][row], logits[-1], atol=1e-5)


@torch.inference_mode()
def test_pages_that_move_take_their_rows_along():
    """Rows go, memory is given back and taken again; those that stay read on as if nothing had happened."""
    model, rng = windowed_model(), random.Random(2)
    texts = [rng.choices(range(256), k=100) for _ in range(12)]
    cache = begun_cache(model, 12, 100)
    for row, text in enumerate(texts):
        read(cache, row, text[:90])
    for row in (11, 3, 7, 0, 5, 1, 2, 4, 6):
        cache.remove_row(min(row, len(cache.positions) - 1))
    before, generation = cache.pool.nbytes, cache.pool.generation
    cache.pool._resize(1, cache.pool.groups[1].num_used)
    cache.pool._resize(0, cache.pool.groups[0].num_used + 3)
    assert cache.pool.nbytes < before and cache.pool.generation == generation + 2
    check_pages(cache.pool)
    for row in range(len(cache.positions)):
        more = rng.choices(range(256), k=5)
        logits = read(cache, row, more)
        whole = [model.forward(torch.tensor([[*text[:90], *more]]))[0, -1] for text in texts]
        assert sum(torch.allclose(logits, other, atol=1e-5) for other in whole) == 1
