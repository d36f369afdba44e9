"""Names of prefixes, and what is forgotten first."""

from __future__ import annotations

import torch
from torch import nn

from nanochat.engine import Engine
from nanochat.page_pool import PagePool
from nanochat.prefix_store import PrefixStore, block_names, weights_version
from tests.toy_model import ByteTokenizer, check_pages, random_model


def test_names_stand_for_all_tokens_up_to_their_block():
    names = list(block_names(range(10), 4))
    assert len(names) == 2 and list(block_names(range(8), 4)) == names
    assert list(block_names([9, 1, 2, 3, 4, 5, 6, 7], 4))[1] != names[1], "the same block after another one"
    assert list(block_names(range(4, 8), 4, names[0])) == names[1:]
    assert list(block_names([], 4)) == []


def pool_of(blocks: int) -> PagePool:
    """A pool whose store may keep a number of blocks, half of its pages."""
    model = random_model("classic", n_layer=1)
    block = PagePool(model, 0).block_bytes
    return PagePool(model, (2 * blocks + 1) * block)


def taken(pool: PagePool) -> list[int]:
    pool.ensure([1])
    return [int(pool.groups[0].take(1)[0])]


def test_the_longest_known_prefix_is_found_and_its_end_forgotten_first():
    store = PrefixStore(pool := pool_of(4))
    for name in (b"a", b"b", b"c", b"x"):
        store.add(name, taken(pool))
    assert len(store.match([b"a", b"b", b"c", b"d"])) == 3 and store.match([b"b", b"z"])
    assert store.match([b"a", b"b", b"c"])
    store.add(b"y", taken(pool))
    assert b"x" not in store and len(store) == 4, "the one that was used longest ago"
    check_pages(pool)
    store.match([b"a", b"b", b"c"])
    assert store.make_room([6])
    assert [name in store for name in (b"a", b"b", b"c")] == [True, True, False]
    assert len(store.match([b"a", b"b"])) == 2 and not store.make_room([7], keep=2)
    assert len(store) == 2 and store.make_room([8]) and len(store) == 0
    store.add(b"a", taken(pool))
    assert not store.make_room([9]) and len(store) == 1, (
        "more than all there is: nothing is forgotten in vain"
    )
    held = store.match([b"a"])[0]
    pool.groups[0].hold(held)
    assert not store.make_room([8]) and len(store) == 1, "nor what a row holds, too"
    pool.groups[0].release(held)
    check_pages(pool)


def test_an_optimiser_step_changes_the_version():
    model = nn.Linear(2, 2)
    before = weights_version(model)
    model(torch.ones(1, 2)).sum().backward()
    torch.optim.AdamW(model.parameters()).step()
    changed = weights_version(model)
    assert changed != before
    store = PrefixStore(pool := pool_of(4))
    store.validate(before)
    store.add(b"a", taken(pool))
    store.validate(before)
    assert len(store) == 1
    store.validate(changed)
    assert len(store) == 0 and pool.groups[0].num_used == 1


def test_other_weights_forget_the_prefixes():
    model, prompt = random_model("classic"), [3] * 40
    engine = Engine(model, ByteTokenizer())
    list(engine.generate(prompt, max_tokens=2))
    assert len(engine.prefixes) == 1
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
        model.transformer["h"][0].attn.c_v.weight.add_(0.3)
    found = [column[0] for column, _ in engine.generate(prompt, max_tokens=8, temperature=0)]
    assert found == list(model.generate(prompt, len(found), temperature=0))
    assert engine.prefixes.tokens_reused == 0
