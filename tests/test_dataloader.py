from __future__ import annotations

import gc
import json
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.dataloader import PretrainLoader
from tests.toy_data import BOS, ByteTokenizer, documents_of_lengths, make_world, write_shard


def _words(seed: int, count: int, longest: int = 40) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(map(chr, rng.integers(97, 123, rng.integers(0, longest)))) for _ in range(count)]


@pytest.fixture
def folder(tmp_path):
    """Two training files with row groups of unequal sizes, and a validation file."""
    write_shard(tmp_path / "shard_00000.parquet", [_words(0, 30), _words(1, 7), _words(2, 19)])
    write_shard(tmp_path / "shard_00001.parquet", [_words(3, 25)])
    write_shard(tmp_path / "shard_00002.parquet", [_words(4, 5)])
    return tmp_path


def _loader(folder, batch_size=2, seq_len=16, rank=0, size=1, split="train", **options):
    options = {"tokenizer_batch_size": 8, "buffer_size": 20, **options}
    return PretrainLoader(
        ByteTokenizer(), batch_size, seq_len, split, make_world(rank, size), data_dir=folder, **options
    )


def _take(loader, count: int) -> list[torch.Tensor]:
    return [torch.stack(next(loader)) for _ in range(count)]


def _row_lengths(row: list[int]) -> list[int]:
    starts = [i for i, token in enumerate(row) if token == BOS] + [len(row)]
    return [stop - start for start, stop in pairwise(starts)]


def _full_rows(loader, count: int) -> list[list[int]]:
    """Rows with their T + 1 tokens."""
    rows = []
    for _ in range(count):
        inputs, targets = next(loader)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        rows += [[*row.tolist(), last] for row, last in zip(inputs, targets[:, -1].tolist(), strict=True)]
    return rows


# --- golden behaviour --------------------------------------------------------------------------------


def test_best_fit_golden_rows_and_epoch(tmp_path):
    write_shard(tmp_path / "a.parquet", [documents_of_lengths([3, 5, 9, 2, 8, 4, 6, 1])])
    write_shard(tmp_path / "b.parquet", [["x"]])
    loader = _loader(tmp_path, batch_size=1, seq_len=7, tokenizer_batch_size=128, buffer_size=4)
    expected = [[8], [6, 2], [5, 3], [8], [6, 2], [5, 3], [4, 4], [1, 6, 1]]
    epochs = []
    for row in expected:
        assert _row_lengths(_full_rows(loader, 1)[0]) == row
        epochs.append(loader.epoch)
    assert epochs[:4] == [1, 1, 1, 2]


def test_best_fit_crops_the_shortest_and_drops_its_rest(tmp_path):
    write_shard(tmp_path / "a.parquet", [documents_of_lengths([9, 12, 5])])
    write_shard(tmp_path / "b.parquet", [["x"]])
    # Slices of one document: with buffer_size=1 the buffer holds what the golden example needs.
    loader = _loader(tmp_path, batch_size=1, seq_len=7, tokenizer_batch_size=128, buffer_size=1)
    rows = _full_rows(loader, 2)
    c, a, b = ord("c") + 1, ord("a") + 1, ord("b") + 1
    assert rows == [[BOS, c, c, c, c, BOS, a, a], [BOS, b, b, b, b, b, b, b]]
    assert loader.stats()["tokens_dropped"] == 6 + 4
    assert loader.stats()["tokens_used"] == 16


def _reference_rows(documents: list[list[int]], capacity: int, buffer_size: int, slice_size: int, count: int):
    """The specification, literally, over an endlessly repeated list of one row group."""
    position, buffer, rows = 0, [], []
    for _ in range(count):
        row: list[int] = []
        while len(row) < capacity:
            while len(buffer) < buffer_size:
                buffer += documents[position : position + slice_size]
                position = position + slice_size if position + slice_size < len(documents) else 0
            remaining = capacity - len(row)
            fitting = [document for document in buffer if len(document) <= remaining]
            length = max(map(len, fitting)) if fitting else min(map(len, buffer))
            index = next(i for i, document in enumerate(buffer) if len(document) == length)
            row += buffer.pop(index)[:remaining]
        rows.append(row)
    return rows


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=50),
    seq_len=st.integers(1, 20),
    buffer_size=st.integers(1, 40),
)
def test_best_fit_equals_the_literal_algorithm(tmp_path_factory, lengths, seq_len, buffer_size):
    folder = tmp_path_factory.mktemp("shards")
    texts = documents_of_lengths(lengths)
    write_shard(folder / "a.parquet", [texts])
    write_shard(folder / "b.parquet", [["x"]])
    loader = _loader(folder, 1, seq_len, tokenizer_batch_size=7, buffer_size=buffer_size)
    documents = ByteTokenizer().encode(texts, prepend=BOS)
    slice_size = 7
    if len(documents) < buffer_size:  # a split smaller than the buffer is never in it twice
        slice_size = min(7, max(1, len(documents) // 8))
        buffer_size = max(1, len(documents) - slice_size)
    assert _full_rows(loader, 12) == _reference_rows(documents, seq_len + 1, buffer_size, slice_size, 12)
    loader.close()


def test_a_small_split_does_not_put_a_document_and_its_copies_into_one_row(tmp_path):
    texts = [f"{i:03d}" for i in range(40)]  # all equally long
    write_shard(tmp_path / "a.parquet", [["x"]])
    write_shard(tmp_path / "b.parquet", [texts])
    loader = _loader(tmp_path, 1, 31, split="val", tokenizer_batch_size=128, buffer_size=1000)
    for row in _full_rows(loader, 20):
        documents = [tuple(row[i : i + 4]) for i in range(0, 32, 4)]
        assert len(set(documents)) == 8


def test_stream_is_the_token_stream_with_one_id_of_overlap(folder):
    loader = _loader(folder, batch_size=3, packing="stream")
    rows = _full_rows(loader, 20)
    texts = _words(0, 30) + _words(1, 7) + _words(2, 19) + _words(3, 25)
    stream = [token for text in texts * 2 for token in [BOS, *(b + 1 for b in text.encode())]]
    for index, row in enumerate(rows):
        assert row == stream[index * 16 : index * 16 + 17]
    assert loader.stats()["tokens_used"] == 60 * 16
    assert loader.stats()["tokens_dropped"] == 0


def test_every_best_fit_row_starts_with_bos(folder):
    assert all(row[0] == BOS for row in _full_rows(_loader(folder), 40))


# --- ranks and batch sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["bestfit", "stream"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_take_the_micro_batches_of_one_rank_in_turn(folder, packing, size):
    single = _take(_loader(folder, packing=packing), 4 * size)
    for rank in range(size):
        ours = _take(_loader(folder, rank=rank, size=size, packing=packing), 4)
        assert all(torch.equal(a, b) for a, b in zip(ours, single[rank::size], strict=True))


def test_a_tiny_split_feeds_more_ranks_than_it_has_documents(folder):
    batches = [_take(_loader(folder, rank=rank, size=8, split="val"), 3) for rank in range(8)]
    single = _take(_loader(folder, split="val"), 24)
    flat = [batches[i % 8][i // 8] for i in range(24)]
    assert all(torch.equal(a, b) for a, b in zip(flat, single, strict=True))


# --- resuming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["bestfit", "stream"])
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 25, 60])
def test_resume_continues_bit_for_bit(folder, packing, steps):
    straight = _loader(folder, packing=packing)
    _take(straight, steps)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = _loader(folder, packing=packing, state=state)
    assert resumed.state_dict() == straight.state_dict()
    for _ in range(30):
        assert torch.equal(*_pair(straight, resumed))
        assert resumed.state_dict() == straight.state_dict()


def _pair(*loaders):
    return [torch.stack(next(loader)) for loader in loaders]


@pytest.mark.parametrize("packing", ["bestfit", "stream"])
def test_resume_on_another_world_size_and_batch_size(folder, packing):
    ranks = [_loader(folder, batch_size=2, rank=rank, size=3, packing=packing) for rank in range(3)]
    for rank in ranks:
        _take(rank, 5)
    states = [rank.state_dict() for rank in ranks]
    assert states[0] == states[1] == states[2], "the state must not depend on the rank that saves it"
    rows = [row for rank in [_take(r, 1)[0] for r in ranks] for row in rank.transpose(0, 1)]
    resumed = _loader(folder, batch_size=6, packing=packing, state=states[0])
    assert torch.equal(_take(resumed, 1)[0].transpose(0, 1), torch.stack(rows))


def test_resume_ignores_shards_that_came_later_but_not_lost_or_changed_ones(folder):
    straight = _loader(folder)
    _take(straight, 3)
    state = straight.state_dict()
    write_shard(folder / "shard_00001a.parquet", [["new"] * 50])
    resumed = _loader(folder, state=state)
    assert all(torch.equal(*_pair(straight, resumed)) for _ in range(40))
    write_shard(folder / "shard_00001.parquet", [["changed"]])
    with pytest.raises(UserError, match=r"shard_00001\.parquet has .* bytes"):
        _loader(folder, state=state)
    (folder / "shard_00001.parquet").unlink()
    with pytest.raises(UserError, match=r"shard_00001\.parquet is missing"):
        _loader(folder, state=state)
    with pytest.raises(UserError, match="seq_len was 16 and is now 8"):
        _loader(folder, seq_len=8, state=state)


@pytest.mark.parametrize(
    ("size", "state", "first"),
    [
        (1, {"pq_idx": 0, "rg_idx": 0}, (0, 1)),
        (2, {"pq_idx": 0, "rg_idx": 0, "epoch": 3}, (0, 2)),
        (8, {"pq_idx": 0, "rg_idx": 0, "epoch": 1}, (1, 0)),  # beyond the end of the file
        (1, {"pq_idx": 1, "rg_idx": 0, "epoch": 1}, (0, 0)),  # beyond the last file: the next pass
    ],
)
def test_upstream_states_continue_one_stride_later(folder, size, state, first):
    groups = {(0, 0): 0, (0, 1): 1, (0, 2): 2, (1, 0): 3}
    loader = _loader(folder, 1, 4, size=size, packing="stream", state=state)
    text = _words(groups[first], 30 if first == (0, 0) else 25)[0]
    expected = [BOS, *(byte + 1 for byte in text.encode())][:4]
    assert next(loader).inputs[0].tolist()[: len(expected)] == expected
    wraps = state["pq_idx"] == 1
    assert loader.epoch == state.get("epoch", 1) + wraps


# --- hostile data and threads ------------------------------------------------------------------------


def test_epochs_are_counted_on_a_tiny_data_set(tmp_path):
    write_shard(tmp_path / "a.parquet", [["ab", "c"]])
    write_shard(tmp_path / "b.parquet", [["x"]])
    loader = _loader(tmp_path, 1, 4, packing="stream")
    epochs = [next(loader) and loader.epoch for _ in range(10)]
    assert epochs == sorted(epochs) and epochs[0] == 1 and epochs[-1] == 9


@pytest.mark.parametrize("row_groups", [[], [[]]])
def test_files_without_documents_are_an_error_not_a_spin(tmp_path, row_groups):
    write_shard(tmp_path / "a.parquet", row_groups)
    write_shard(tmp_path / "b.parquet", [["x"]])
    with pytest.raises(UserError, match=r"no document in a\.parquet"):
        next(_loader(tmp_path))


def test_a_damaged_file_and_a_missing_column_reach_the_caller(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_shard(tmp_path / "b.parquet", [["x"]])
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    loader = _loader(tmp_path, packing="stream")
    for _ in range(2):  # the error of the thread, as often as it is asked
        with pytest.raises(UserError, match=r"cannot read .*a\.parquet"):
            next(loader)
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet"):
        _loader(tmp_path)
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has no column `text`, only content"):
        next(_loader(tmp_path))


def test_empty_documents_become_a_bare_bos(tmp_path):
    write_shard(tmp_path / "a.parquet", [["", "", ""]])
    write_shard(tmp_path / "b.parquet", [["x"]])
    assert _full_rows(_loader(tmp_path, 1, 4), 2) == [[BOS] * 5] * 2


def _prefetch_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_closing_and_dropping_a_loader_stop_its_thread(folder):
    before = _prefetch_threads()
    loader = _loader(folder)
    next(loader)
    assert _prefetch_threads() == before + 1
    loader.close()
    assert _prefetch_threads() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    other = _loader(folder)
    del other
    gc.collect()
    assert _prefetch_threads() == before


def test_batches_keep_their_values_while_later_ones_are_made(folder):
    loader = _loader(folder)
    first = next(loader)
    copy = first.inputs.clone()
    _take(loader, 20)
    assert torch.equal(first.inputs, copy)


def test_packing_runs_ahead_of_the_consumer(folder):
    class Slow(ByteTokenizer):
        def encode_arrays(self, texts, prepend):
            time.sleep(0.01)
            return super().encode_arrays(texts, prepend)

    options = {"tokenizer_batch_size": 1, "buffer_size": 10, "data_dir": folder}
    loader = PretrainLoader(Slow(), 8, 16, "train", make_world(), **options)
    next(loader)
    time.sleep(0.3)
    started = time.perf_counter()
    next(loader)
    assert time.perf_counter() - started < 0.03, "a batch takes at least 8 documents, 0.08 s"
    loader.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_batches_survive_a_busy_device(folder):
    from nanochat.common import World

    device = torch.device("cuda", 0)
    options = {"tokenizer_batch_size": 8, "buffer_size": 20, "data_dir": folder}
    loader = PretrainLoader(ByteTokenizer(), 2, 16, "train", World(0, 0, 1, device), **options)
    expected = _take(_loader(folder), 50)
    matrix = torch.randn(4096, 4096, device=device)
    got = []
    for _ in range(50):  # copies queue up behind kernels while the thread fills the next blocks
        matrix = (matrix @ matrix).tanh()
        got.append(torch.stack(next(loader)))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))
