from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.chat_loader import ChatLoader, count_rows
from nanochat.common import UserError
from tests.toy_data import BOS, ByteTokenizer, conversation, make_world

TOKENIZER = ByteTokenizer()


def _task(seed: int, count: int, longest: int = 30) -> list[dict]:
    """Conversations that all differ: each starts with its number."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, (count, 2)).tolist()
    return [conversation(f"{i:03d}" + "q" * a, f"{i:03d}" + "a" * b) for i, (a, b) in enumerate(lengths)]


def _loader(task, batch_size=2, seq_len=24, rank=0, size=1, **options) -> ChatLoader:
    return ChatLoader(TOKENIZER, task, batch_size, seq_len, make_world(rank, size), **options)


def _take(loader, count: int) -> list[torch.Tensor]:
    return [torch.stack(next(loader)) for _ in range(count)]


def _all(loader) -> torch.Tensor:
    """All batches of a loader that ends: (rows, 2, T)."""
    return torch.cat([torch.stack(batch, dim=1) for batch in loader])


def _supervised(task, limit: int | None = None) -> list[list[int]]:
    """The target tokens of every conversation, sorted."""
    rows = [TOKENIZER.render_conversation(item, 10**9) for item in task]
    return sorted([t for t, m in list(zip(ids, mask, strict=True))[:limit] if m] for ids, mask in rows)


def _targets_by_conversation(rows: torch.Tensor) -> list[list[int]]:
    """Runs of consecutive targets, sorted."""
    runs = []
    for targets in rows[:, 1].tolist():
        runs.append([])
        for target in targets:
            if target == -1:
                runs.append([])
            else:
                runs[-1].append(target)
    return sorted(run for run in runs if run)


# --- rows and masks ----------------------------------------------------------------------------------


def test_targets_are_the_next_tokens_where_the_mask_says_so():
    rows = _all(_loader([conversation("ab", "cd")], batch_size=1, seq_len=8, epochs=1))
    a, b, c, d = (ord(letter) + 1 for letter in "abcd")
    assert rows.tolist() == [[[BOS, a, b, c, d, BOS, BOS, BOS], [-1, -1, c, d, -1, -1, -1, -1]]]


def test_without_mask_every_token_but_padding_is_a_target():
    task = [conversation("ab", "cd"), conversation("e", "f")]
    rows = _all(_loader(task, batch_size=1, seq_len=9, mask=False, epochs=1))
    a, b, c, d, e, f = (ord(letter) + 1 for letter in "abcdef")
    assert rows.tolist() == [[[BOS, a, b, c, d, BOS, e, f, BOS], [a, b, c, d, BOS, e, f, -1, -1]]]


def test_longest_fitting_conversation_goes_first():
    lengths = [5, 9, 3, 7, 4, 6]
    task = [conversation("q", "a" * (length - 2)) for length in lengths]
    rows = _all(_loader(task, batch_size=1, seq_len=11, epochs=1))
    starts = [[i for i, token in enumerate(row) if token == BOS] for row in rows[:, 0].tolist()]
    # capacity 12: 9 + 3, then 7 + 5, then 6 + 4 and padding
    assert starts == [[0, 9], [0, 7], [0, 6, 10]]


def test_one_epoch_holds_every_supervised_token_once():
    task = _task(0, 150)
    loader = _loader(task, batch_size=3, seq_len=80, epochs=1)
    rows = _all(loader)
    assert _targets_by_conversation(rows) == _supervised(task)
    assert bool((rows[:, 0, 0] == BOS).all())
    stats = loader.stats()
    assert stats["conversations_used"] == 150
    assert stats["tokens_supervised"] == int((rows[:, 1] >= 0).sum()) == sum(map(len, _supervised(task)))
    assert stats["conversations_truncated"] == stats["conversations_dropped"] == 0
    assert stats["rows"] == len(rows)
    assert stats["tokens_used"] + stats["tokens_padding"] == len(rows) * 81


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=40),
    seq_len=st.integers(1, 30),
    batch_size=st.integers(1, 4),
    mask=st.booleans(),
)
def test_long_conversations_are_cut_and_nothing_stalls(lengths, seq_len, batch_size, mask):
    task = [conversation("q" * a, "a" * b) for a, b in lengths]
    cut = [list(zip(*TOKENIZER.render_conversation(item, seq_len + 1), strict=True)) for item in task]
    expected = sum(sum(m or not mask for _, m in item[1:]) for item in cut)
    loader = _loader(task, batch_size, seq_len, mask=mask, epochs=1)
    if not expected:
        with pytest.raises(UserError, match="none of the"):
            next(loader)
        return
    rows = _all(loader)
    is_inner_bos = 0 if mask else int(((rows[:, 1] == BOS) & (rows[:, 1] >= 0)).sum())
    assert int((rows[:, 1] >= 0).sum()) - is_inner_bos == expected
    stats = loader.stats()
    assert stats["conversations_used"] + stats["conversations_dropped"] == len(task)
    longer = [1 + a + b > seq_len + 1 for a, b in lengths]
    assert stats["conversations_truncated"] <= sum(longer)
    assert loader.exhausted and loader.progress == 1.0
    assert count_rows(TOKENIZER, task, seq_len, mask=mask) <= len(rows)


def test_the_unlearnable_and_the_cut_are_counted():
    task = [conversation("q" * 50, "a"), conversation("q", "a" * 50), conversation("q", "a")]
    loader = _loader(task, batch_size=1, seq_len=9, epochs=1)
    rows = _all(loader)
    stats = loader.stats()
    assert stats["conversations_dropped"] == 1
    assert stats["conversations_truncated"] == 1
    assert stats["conversations_used"] == 2
    assert stats["tokens_truncated"] == (52 - 10) * 2
    assert int((rows[:, 1] >= 0).sum()) == 8 + 1


class NumberTokenizer:
    """No two tokens of a task are alike: token k of conversation i is 1000 i + k + 1; BOS is 0, as ever."""

    def get_bos_token_id(self) -> int:
        return BOS

    def render_conversation(self, conversation, max_tokens=2048):
        mask = conversation["mask"]
        ids = [BOS, *(1000 * conversation["number"] + k + 1 for k in range(1, len(mask)))]
        return ids[:max_tokens], mask[:max_tokens]


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 25)), max_size=5), min_size=1, max_size=60),
    seq_len=st.integers(1, 40),
    batch_size=st.integers(1, 3),
    size=st.integers(1, 2),
)  # fmt: skip
def test_every_supervised_token_comes_once_per_epoch_or_is_reported(shapes, seq_len, batch_size, size):
    """Conversations of random turns, also longer than the row; as many ranks as may be."""
    masks = [[0] + [learn for learn, count in turns for _ in range(count)] for turns in shapes]
    task = [{"number": i, "mask": mask} for i, mask in enumerate(masks)]
    all_targets = [
        {1000 * i + k + 1 for k, learn in enumerate(mask) if learn} for i, mask in enumerate(masks)
    ]
    fitting = [{t for t in own if (t - 1) % 1000 <= seq_len} for own in all_targets]
    if not any(fitting):
        return
    loaders = [
        ChatLoader(NumberTokenizer(), task, batch_size, seq_len, make_world(rank, size), epochs=2)
        for rank in range(size)
    ]
    seen = [t for batches in zip(*loaders, strict=True) for _, ts in batches for t in ts.flatten().tolist()]
    assert sorted(t for t in seen if t >= 0) == sorted(2 * [t for own in fitting for t in own])
    stats = loaders[0].stats()
    assert stats["tokens_supervised"] == 2 * sum(map(len, fitting))
    assert stats["tokens_supervised_lost"] == 2 * sum(
        len(a - b) for a, b in zip(all_targets, fitting, strict=True)
    )
    assert stats["conversations_dropped"] == 2 * sum(not own for own in fitting)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), median=st.floats(15, 60), spread=st.floats(0.3, 1.3))
def test_padding_stays_below_three_percent(seed, median, spread):
    """Lengths as conversations have them, some longer than the row; a row takes four or more of the usual ones."""
    lengths = np.random.default_rng(seed).lognormal(np.log(median), spread, 2000).astype(int) + 2
    task = [{"number": i, "mask": [0] + [1] * min(n, 999)} for i, n in enumerate(lengths.tolist())]
    loader = ChatLoader(NumberTokenizer(), task, 4, 256, make_world(), epochs=1)
    rows = sum(len(batch.inputs) for batch in loader)
    stats = loader.stats()
    assert stats["conversations_used"] == 2000 and stats["rows"] <= rows < stats["rows"] + 4
    assert stats["fraction_padding"] < 0.03


# --- epochs, ranks, resuming -------------------------------------------------------------------------


def test_progress_grows_to_one_over_all_epochs():
    task = _task(1, 130)
    loader = _loader(task, epochs=2, seq_len=70)
    progress, epochs = [], []
    for _ in loader:
        progress.append(loader.progress)
        epochs.append(loader.epoch)
    assert progress == sorted(progress) and progress[-1] == 1.0
    assert epochs[0] == 1 and epochs[-1] == 2
    assert loader.stats()["conversations_used"] == 260
    with pytest.raises(StopIteration):
        next(loader)


def test_without_epochs_it_never_ends():
    loader = _loader(_task(2, 3), seq_len=70)
    _take(loader, 200)
    assert not loader.exhausted and loader.progress == 1.0 and loader.epoch > 10


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_take_the_micro_batches_of_one_rank_in_turn(size):
    task = _task(3, 150)
    ranks = [list(_loader(task, rank=rank, size=size, epochs=1)) for rank in range(size)]
    assert len({len(batches) for batches in ranks}) == 1, "all ranks must make the same number of steps"
    single = list(_loader(task, epochs=1))
    dealt = [ranks[i % size][i // size] for i in range(size * len(ranks[0]))]
    for ours, theirs in zip(dealt, single, strict=False):
        assert torch.equal(torch.stack(ours), torch.stack(theirs))
    assert all(bool((batch.targets == -1).all()) for batch in dealt[len(single) :])


@pytest.mark.parametrize("steps", [0, 1, 5, 20])
def test_resume_continues_bit_for_bit(steps):
    task = _task(4, 160)
    straight = _loader(task, epochs=2)
    _take(straight, steps)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = _loader(task, epochs=2, state=state)
    assert resumed.stats() == straight.stats() and resumed.progress == straight.progress
    rest, resumed_rest = list(straight), list(resumed)
    assert len(rest) == len(resumed_rest) > 0
    for ours, theirs in zip(rest, resumed_rest, strict=True):
        assert torch.equal(torch.stack(ours), torch.stack(theirs))
    assert resumed.state_dict() == straight.state_dict()


def test_resume_on_another_world_size_and_batch_size():
    task = _task(5, 200)
    ranks = [_loader(task, rank=rank, size=2) for rank in range(2)]
    for rank in ranks:
        _take(rank, 6)
    assert ranks[0].state_dict() == ranks[1].state_dict()
    resumed = _loader(task, batch_size=4, state=ranks[1].state_dict())
    expected = torch.cat([_take(rank, 1)[0] for rank in ranks], dim=1)
    assert torch.equal(_take(resumed, 1)[0], expected)


def test_a_state_of_other_data_is_refused():
    state = _loader(_task(6, 20)).state_dict()
    with pytest.raises(UserError, match="num_conversations was 20 and is now 21"):
        _loader(_task(6, 21), state=state)
    with pytest.raises(UserError, match="mask was True and is now False"):
        _loader(_task(6, 20), mask=False, state=state)


def test_bad_tasks_give_one_clear_line():
    with pytest.raises(UserError, match="holds no conversation"):
        _loader([])

    class Strict(ByteTokenizer):
        def render_conversation(self, conversation, max_tokens=2048):
            raise ValueError("message 0 must be from user")

    loader = ChatLoader(Strict(), _task(7, 3), 1, 8, make_world())
    with pytest.raises(UserError, match="conversation 0 of the training data: message 0 must be from user"):
        next(loader)


def test_count_rows_tells_the_length_of_an_epoch():
    task = _task(8, 170)
    assert count_rows(TOKENIZER, task, 50) == len(_all(_loader(task, batch_size=1, seq_len=50, epochs=1)))
    twice = _all(_loader(task, batch_size=1, seq_len=50, epochs=2))
    shares: list[float] = []
    assert count_rows(TOKENIZER, task, 50, epochs=2, report=shares.append) == len(twice)
    assert len(shares) == len(twice) and shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1


# --- the mask that reaches the model -----------------------------------------------------------------


def test_the_trainer_learns_exactly_what_the_assistant_writes():
    """With the real tokenizer: answers, tool calls and their ends are targets; users and tools are not."""
    from nanochat.tokenizer import RustBPETokenizer

    tokenizer = RustBPETokenizer.train_from_iterator(iter(["how much is two and two, four"] * 9), 300)
    parts = [
        {"type": "text", "text": "two and two "},
        {"type": "python", "text": "2+2"},
        {"type": "python_output", "text": "4"},
        {"type": "text", "text": " four"},
    ]
    messages = [
        {"role": "user", "content": "how much?"},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "and two?"},
        {"role": "assistant", "content": "much"},
    ]
    task = [{"messages": messages}, conversation("how", "two")]
    loader = ChatLoader(tokenizer, task, 1, 120, make_world(), epochs=1)
    inputs, targets = (tensor[0] for tensor in next(loader))
    is_target = targets >= 0
    assert torch.equal(targets[:-1][is_target[:-1]], inputs[1:][is_target[:-1]])
    assert tokenizer.decode(targets[is_target].tolist()) == (
        "two and two <|python_start|>2+2<|python_end|> four<|assistant_end|>"
        "much<|assistant_end|>two<|assistant_end|>"
    )
