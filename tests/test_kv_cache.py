"""The cache's bookkeeping: positions, copies, limits."""

from __future__ import annotations

import pytest
import torch

from nanochat.kv_cache import ContextOverflow, KVCache


def filled(batch: int, length: int, slots: int = 16) -> KVCache:
    cache = KVCache(batch, 2, slots, 4, 3)
    cache.k_cache[:, :, :length].normal_()
    cache.v_cache[:, :, :length].normal_()
    cache.prev_embedding = torch.randn(batch, 1, 8)
    cache.advance(length)
    return cache


def test_shapes_positions_and_reset():
    cache = filled(2, 5)
    assert cache.k_cache.shape == (3, 2, 16, 2, 4)
    assert cache.get_layer_cache(1)[0].shape == (2, 16, 2, 4)
    assert cache.get_pos() == 5 and cache.cache_seqlens.tolist() == [5, 5] and cache.remaining() == 11
    assert cache.nbytes == 2 * 3 * 2 * 16 * 2 * 4 * 4
    cache.advance([1, 3])
    assert cache.positions == [6, 8] and cache.remaining() == 8
    cache.reset()
    assert cache.positions == [0, 0] and cache.prev_embedding is None


def test_prefill_copies_data_and_broadcasts_one_row():
    source, target = filled(1, 5), KVCache(3, 2, 32, 4, 3)
    target.prefill(source)
    assert target.positions == [5, 5, 5]
    for row in range(3):
        assert torch.equal(target.k_cache[:, row, :5], source.k_cache[:, 0, :5])
        assert torch.equal(target.prev_embedding[row], source.prev_embedding[0])
    with pytest.raises(ValueError, match="empty cache"):
        target.prefill(source)


def test_prefill_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="cannot fill"):
        KVCache(3, 2, 32, 4, 3).prefill(filled(2, 5))
    with pytest.raises(ContextOverflow):
        KVCache(1, 2, 4, 4, 3).prefill(filled(1, 5))


def test_select_keeps_and_reorders_rows():
    cache = filled(3, 5)
    keys, previous = cache.k_cache.clone(), cache.prev_embedding.clone()
    cache.advance([0, 1, 2])
    cache.select([2, 0])
    assert cache.positions == [7, 5] and cache.batch_size == 2
    assert torch.equal(cache.k_cache, keys[:, [2, 0]]) and torch.equal(cache.prev_embedding, previous[[2, 0]])


def test_overflow_names_both_numbers():
    cache = filled(1, 15)
    cache.ensure(1)
    with pytest.raises(ContextOverflow, match="16 slots is at 15, cannot take 2"):
        cache.begin(2)


def test_lengths_must_fit_the_chunk():
    with pytest.raises(ValueError, match="do not fit"):
        KVCache(2, 2, 16, 4, 3).begin(4, [5, 1])
