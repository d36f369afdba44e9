"""Finding the micro-batch: the search by itself, and a real run that must show no trace of it."""

from __future__ import annotations

import pytest
import torch

from nanochat.batch_fit import Trial, best, candidates, search
from nanochat.checkpoint_manager import Checkpoint
from nanochat.common import UserError, read_json, write_json
from tests.training import BASE_FLAGS, run_here, weights

pytestmark = pytest.mark.usefixtures("one_seeded_thread")


def machine(start, per_row, capacity, seconds_per_row):
    """A measure of a machine with `capacity` bytes, and what it was asked."""
    asked = []

    def measure(rows):
        asked.append(rows)
        used = start + per_row * rows
        return Trial(rows, used, rows * seconds_per_row(rows)) if used <= capacity else None

    return measure, asked


def test_candidates_divide_the_step():
    assert candidates(16) == [1, 2, 4, 8, 16]
    assert candidates(1) == [1] and candidates(7) == [1, 7]
    assert all(360 % rows == 0 for rows in candidates(360)) and len(candidates(360)) < 15


def test_the_search_stops_before_memory_runs_out():
    measure, asked = machine(100, 10, 10_000, lambda rows: 1 / rows)
    trials = list(search(candidates(64), measure, 100, limit_bytes=250))
    assert asked == [1, 2, 4, 8]  # 16 rows would take 260 and are not tried
    assert best(trials).rows == 8


def test_running_out_of_memory_ends_the_search_with_what_fitted():
    measure, _ = machine(100, 10, 145, lambda rows: 1 / rows)
    flat = [Trial(n, 100, 1 / n) for n in (1, 2)]  # memory that does not show growth cannot be predicted
    answers = iter([*flat, measure(8)])
    assert list(search([1, 2, 4, 8], lambda rows: next(answers), 100, 1000)) == flat
    assert not list(search([1, 2], machine(100, 60, 145, lambda rows: 1)[0], 100, 130))


def test_slower_batches_end_the_search_and_equals_go_to_the_larger():
    cost = {1: 1.0, 2: 0.8, 4: 0.805, 8: 0.9, 16: 0.1}
    measure, asked = machine(0, 1, 100, cost.__getitem__)
    assert best(list(search(candidates(16), measure, 0, 100))).rows == 4
    assert asked == [1, 2, 4, 8]


def test_a_measured_run_equals_a_run_that_was_told(tiny_run, capsys):
    flags = {"num_iterations": 2, "eval_every": -1}
    run_here("base_train", device_batch_size=None, **flags)
    directory = tiny_run / "base_checkpoints"
    measured = Checkpoint.open(directory / "t", 2).meta
    rows = measured["device_batch_size"]
    assert (
        BASE_FLAGS["total_batch_size"] // BASE_FLAGS["max_seq_len"] % rows == 0 and not measured["recompute"]
    )
    assert f"device batch size: {rows} rows (auto" in capsys.readouterr().out
    for recompute in (False, True):  # which computes the same numbers
        told = {"device_batch_size": rows, "recompute": recompute, "model_tag": f"told{recompute}"}
        run_here("base_train", **flags, **told)
        ours, exact = weights(directory / "t"), weights(directory / f"told{recompute}")
        assert all(torch.equal(ours[name], exact[name]) for name in exact)


def test_where_nothing_fits_it_says_so(tiny_run, monkeypatch):
    monkeypatch.setattr("nanochat.batch_fit.memory_for_this_process", lambda device: 1e6)
    with pytest.raises(UserError, match="not even one row of 64 tokens fits"):
        run_here("base_train", device_batch_size=None)


@pytest.mark.parametrize("said", ["CUDA out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"])
def test_memory_may_end_in_the_optimizer_step(tiny_run, monkeypatch, said):
    def step(self, skip=None):
        raise RuntimeError(said)

    monkeypatch.setattr("nanochat.optim.MuonAdamW.step", step)
    with pytest.raises(UserError, match="not even one row of 64 tokens fits"):
        run_here("base_train", device_batch_size=None)


def test_an_interrupted_run_keeps_its_batch_and_the_next_stage_too(tiny_run, capsys):
    run_here("base_train", save_every=3, device_batch_size=4, recompute=True)
    directory = tiny_run / "base_checkpoints" / "t"
    for path in directory.glob("*_000006.*"):
        path.unlink()
    run_here("base_train", device_batch_size=None)
    meta = Checkpoint.open(directory, 6).meta
    assert (meta["device_batch_size"], meta["recompute"]) == (4, True)
    run_here("mid_train", source="base", num_iterations=1, eval_every=-1)
    meta = Checkpoint.open(tiny_run / "mid_checkpoints" / "t", 1).meta
    assert (meta["device_batch_size"], meta["recompute"]) == (4, True)
    of_eight_ranks = read_json(directory / "meta_000006.json") | {"world_size": 8}
    write_json(directory / "meta_000006.json", of_eight_ranks)
    capsys.readouterr()
    run_here("mid_train", source="base", num_iterations=1, eval_every=-1, resume="never")
    assert "rows (auto" in capsys.readouterr().out
