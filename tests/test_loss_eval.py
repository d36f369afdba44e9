from __future__ import annotations

import math

import pytest
import torch

from nanochat.common import World
from nanochat.loss_eval import evaluate_bpb, tokens_by_default
from tests.toy_data import make_world

TOKEN_BYTES = torch.tensor([0, 1, 2, 3], dtype=torch.int32)  # token 0 is special


class TableModel:
    """The loss of a position is given by its target token."""

    def __init__(self, nats: dict[int, float]) -> None:
        self.nats = nats

    def __call__(self, idx, targets, *, loss_reduction):
        assert loss_reduction == "none"
        return torch.tensor([self.nats[target] for target in targets.flatten().tolist()])


def _batches(*rows: list[int]):
    return iter([(torch.tensor([row]), torch.tensor([row])) for row in rows])


def test_special_and_ignored_targets_count_neither_as_loss_nor_as_bytes():
    model = TableModel({-1: math.inf, 0: math.inf, 1: 0.5, 2: 1.0, 3: 1.5})
    bpb = evaluate_bpb(model, _batches([0, 1, -1, 2], [3, 3, 0, -1]), 2, TOKEN_BYTES, make_world())
    assert bpb == pytest.approx((0.5 + 1.0 + 1.5 + 1.5) / (math.log(2) * (1 + 2 + 3 + 3)), rel=1e-12)


def test_a_long_evaluation_says_how_far_it_is(capsys, monkeypatch):
    model = TableModel({1: 1.0})
    evaluate_bpb(model, _batches([1], [1]), 2, TOKEN_BYTES, make_world())
    assert not capsys.readouterr().out
    monkeypatch.setattr("nanochat.loss_eval.QUIET_S", 0.0)
    monkeypatch.setattr(
        "nanochat.metrics.StatusLine.show", lambda self, text, final=False: print(text, final)
    )
    evaluate_bpb(model, _batches([1], [1]), 2, TOKEN_BYTES, make_world())
    assert capsys.readouterr().out.splitlines() == [
        "bits per byte: batch 1 of 2 | 0s left False", "bits per byte: batch 2 of 2 | 0s left True",
    ]  # fmt: skip


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 524_288), ("cuda", 40_000_000)])
def test_a_cpu_measures_less_by_default(device, tokens):
    assert tokens_by_default(40_000_000, torch.device(device)) == tokens


def test_only_the_given_number_of_steps_is_taken():
    batches = _batches([1], [2], [3])
    model = TableModel({1: 1.0, 2: 5.0, 3: 9.0})
    assert evaluate_bpb(model, batches, 1, TOKEN_BYTES, make_world()) == pytest.approx(1 / math.log(2))
    assert next(batches)[0].item() == 2


def test_no_counted_byte_gives_infinity():
    model = TableModel({-1: 0.0, 0: 3.0})
    assert evaluate_bpb(model, _batches([-1, 0, -1]), 1, TOKEN_BYTES, make_world()) == math.inf


def test_sums_keep_float64_precision():
    row = [1] * 200_000
    model = TableModel({1: 0.1})
    bpb = evaluate_bpb(model, _batches(*[row] * 3), 3, TOKEN_BYTES, make_world())
    assert bpb == pytest.approx(float(torch.tensor(0.1)) / math.log(2), rel=1e-12)


def test_ranks_are_summed_before_the_division():
    model = TableModel({1: 0.5, 2: 4.0, 3: 0.1})
    parts = []

    class Recorder(World):
        __slots__ = ()

        def sum(self, tensor):
            parts.append(tensor.clone())
            return tensor

    world = Recorder(0, 0, 2, torch.device("cpu"))
    evaluate_bpb(model, _batches([1, 1, 2]), 1, TOKEN_BYTES, world)
    evaluate_bpb(model, _batches([3]), 1, TOKEN_BYTES, world)
    nats, num_bytes = (parts[0] + parts[1]).tolist()
    together = evaluate_bpb(model, _batches([1, 1, 2], [3]), 2, TOKEN_BYTES, make_world())
    assert nats / (math.log(2) * num_bytes) == pytest.approx(together, rel=1e-12)
