"""Names of prefixes, and what is forgotten first."""

from __future__ import annotations

import torch
from torch import nn

from nanochat.prefix_store import PrefixStore, block_names, weights_version


def test_names_stand_for_all_tokens_up_to_their_block():
    names = list(block_names(range(10), 4))
    assert len(names) == 2 and list(block_names(range(8), 4)) == names
    assert list(block_names([9, 1, 2, 3, 4, 5, 6, 7], 4))[1] != names[1], "the same block after another one"
    assert list(block_names(range(4, 8), 4, names[0])) == names[1:]
    assert list(block_names([], 4)) == []


def test_the_longest_known_prefix_is_found_and_its_end_forgotten_first():
    store, block = PrefixStore(), torch.zeros(2, 4, 1, 2)
    size = block.numel() * 4
    for name in (b"a", b"b", b"c", b"x"):
        store.add(name, block.clone(), 4 * size)
    assert len(store.match([b"a", b"b", b"c", b"d"])) == 3 and store.match([b"b", b"z"])
    assert store.match([b"a", b"b", b"c"]) and store.nbytes == 4 * size
    store.add(b"y", block, 4 * size)
    assert b"x" not in store and len(store) == 4, "the one that was used longest ago"
    store.match([b"a", b"b", b"c"])
    store.shrink(2 * size)
    assert [name in store for name in (b"a", b"b", b"c")] == [True, True, False]
    store.add(b"z", block, size - 1)
    assert b"z" not in store, "larger than all that is allowed"


def test_an_optimiser_step_changes_the_version():
    model = nn.Linear(2, 2)
    before = weights_version(model)
    model(torch.ones(1, 2)).sum().backward()
    torch.optim.AdamW(model.parameters()).step()
    changed = weights_version(model)
    assert changed != before
    store = PrefixStore()
    store.validate(before)
    store.add(b"a", torch.zeros(1), 100)
    store.validate(before)
    assert len(store) == 1
    store.validate(changed)
    assert len(store) == 0 and store.nbytes == 0
