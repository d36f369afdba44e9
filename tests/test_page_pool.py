"""Pages: how many a row needs, who holds them, and how memory follows."""

from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import pytest

from nanochat.engine import Engine
from nanochat.page_pool import PAGE, PagePool
from nanochat.row_cache import RowCache
from nanochat.sampling import SamplingParams
from tests.toy_model import ByteTokenizer, ScriptedModel, check_pages, random_model


def windowed_pool(rows: float) -> PagePool:
    """Two layers that see 8 tokens back and one that sees 192, with memory for a number of whole rows."""
    windows = dict(short_window_divisor=24, short_window_multiple=8)
    model = random_model("modern", sequence_len=192, n_layer=3, n_embd=32, **windows)
    row = PagePool(model, 0, 16).bytes_for(192)
    return PagePool(model, int(rows * row), 16)


def test_a_row_needs_pages_for_its_tokens_and_no_more_than_a_window():
    pool = windowed_pool(2)
    page = PAGE * 2 * 8 * 4 * 2  # two heads of 8, fp32, keys and values
    assert [group.page_bytes for group in pool.groups] == [2 * page, page]
    assert pool.nbytes == 0
    one = 3 * page  # page 0 of each group
    for tokens, windowed, whole in ((1, 1, 1), (32, 1, 1), (33, 2, 2), (64, 2, 2), (65, 2, 3), (192, 2, 6)):
        assert pool.bytes_for(tokens) == one + windowed * 2 * page + whole * page


def test_growing_uses_what_the_bound_allows_and_shrinking_gives_it_back():
    pool = windowed_pool(6)
    pool.ensure([2, 2])
    check_pages(pool)
    assert [group.capacity for group in pool.groups] == [3, 7], (
        "room for a row of the whole context from the start"
    )
    whole = pool.groups[1]
    first = whole.take(6)
    assert first.tolist() == [1, 2, 3, 4, 5, 6], "pages of one row adjoin"
    pool.ensure([0, 1])
    assert whole.capacity == 14, "doubled"
    second = whole.take(7)
    whole.hold(second[:2])
    whole.release(first)
    whole.release(second)
    assert whole.num_used == 1 + 2 and whole.take(1) == second[2], "those that others hold stay"
    whole.release(second[2:3])
    for pages in (second[:1], second[1:2]):
        whole.release(pages)
    pool.ensure([0, 40])
    pool.shrink()
    assert whole.capacity == 7 and whole.num_used == 1


def test_memory_that_one_group_does_not_use_is_the_others():
    pool = windowed_pool(2)
    windowed, whole = pool.groups
    spare = pool.max_bytes - pool.bytes_for(0)
    most = spare // whole.page_bytes
    assert pool.fits([0, most]) and not pool.fits([0, most + 1]) and not pool.fits([1, most])
    pool.ensure([4, 1])
    pool.ensure([0, most])
    assert windowed.capacity == 1 and whole.capacity == 1 + most and pool.nbytes <= pool.max_bytes
    taken = whole.take(most)
    assert sorted(taken) == list(range(1, most + 1))
    assert not pool.fits([1, 0])
    whole.release(taken)
    pool.ensure([spare // windowed.page_bytes, 0])
    assert pool.nbytes <= pool.max_bytes


def take_marked(pool: PagePool, count: int) -> tuple[int, np.ndarray]:
    """A layer, and pages of its group that hold their own numbers there."""
    pool.ensure([0, count])
    whole = pool.groups[1]
    layer, pages = whole.layers[0], whole.take(count)
    for page in pages:
        pool.keys[layer][page], pool.values[layer][page] = float(page), -float(page)
    return layer, pages


def test_pages_keep_what_they_hold_when_they_move():
    pool = windowed_pool(4)
    layer, pages = take_marked(pool, 12)
    whole = pool.groups[1]
    kept = pages[[1, 4, 9]]
    whole.release(np.setdiff1d(pages, kept))

    class Holder:
        def renumber(self, group: int, numbers: np.ndarray) -> None:
            assert group == 1
            self.found = numbers[kept]

    holder = Holder()
    pool.register(holder)
    pool._resize(1, 5)
    assert sorted(holder.found) == [1, 2, 3] and whole.free == [4]
    for old, new in zip(kept, holder.found, strict=True):
        assert (pool.keys[layer][new] == float(old)).all() and (pool.values[layer][new] == -float(old)).all()


@pytest.mark.parametrize("capacity", [9, 40])
def test_memory_that_ends_while_pages_move_loses_none(capacity, monkeypatch):
    pool = windowed_pool(12)
    layer, pages = take_marked(pool, 12)
    whole = pool.groups[1]
    whole.release(pages[:5])

    kept = pages[5:]

    class Holder:
        pages = kept

        def renumber(self, group: int, numbers: np.ndarray) -> None:
            self.pages = numbers[self.pages]

    holder, empty, tries = Holder(), pool._empty, iter([True, False])
    pool.register(holder)

    def fail(count: int):
        if not next(tries):
            raise MemoryError
        return empty(count)

    monkeypatch.setattr(pool, "_empty", fail)
    for _ in range(2):
        with suppress(MemoryError):
            pool._resize(1, capacity)
        for old, new in zip(kept, holder.pages, strict=True):
            assert (pool.keys[layer][new] == float(old)).all() and (
                pool.values[layer][new] == -float(old)
            ).all()
        assert sorted({0, *holder.pages, *whole.free}) == list(range(whole.capacity))
        monkeypatch.setattr(pool, "_empty", empty)


def test_memory_for_all_that_wait_comes_at_once_where_steps_are_recorded(monkeypatch):
    """And stays for the next ones when what is remembered is forgotten."""
    monkeypatch.setattr(RowCache, "can_run_ahead", True)
    model, rng = random_model("classic", sequence_len=256), random.Random(0)
    engine = Engine(model, ByteTokenizer(), cache_bytes=1 << 28, chunk_tokens=16, max_batch=32)
    prompts = [rng.choices(range(256), k=60) for _ in range(32)]
    for _ in range(2):
        for prompt in prompts:
            engine.submit(prompt, SamplingParams(temperature=0, max_tokens=8))
        while not engine._shared.is_idle:
            engine.step()
            check_pages(engine.prefixes.pool)
        assert engine.prefixes.pool.generation == 1
        engine.prefixes.clear()


def test_memory_does_not_come_and_go_where_answers_are_shorter_than_they_may_be(monkeypatch):
    monkeypatch.setattr(RowCache, "can_run_ahead", True)
    end, rng = ByteTokenizer().encode_special("<|assistant_end|>"), random.Random(0)
    model = ScriptedModel(
        lambda history: end if len(history) > 12 + history[0] % 16 else 65, sequence_len=512
    )
    engine = Engine(model, ByteTokenizer(), max_batch=64)
    for _ in range(200):
        engine.submit(rng.choices(range(256), k=10), SamplingParams(max_tokens=256))
    while not engine._shared.is_idle:
        engine.step()
        assert engine.prefixes.pool.generation == 1 or not engine._shared.waiting
    assert engine.prefixes.pool.generation < 10, "given back bit by bit at the end"
