"""Scores of many sequences at once are those of each alone, whatever they share, within a bounded memory."""

from __future__ import annotations

import random

import pytest
import torch

from nanochat import core_scoring
from nanochat.core_scoring import Scored, score_examples, score_sequences
from nanochat.gpt import GPT, GPTConfig
from tests.toy_model import opinionated_network

CONFIGS = {
    "modern": GPTConfig.modern(sequence_len=256, vocab_size=257, n_layer=3, n_head=4, n_kv_head=2, n_embd=32),
    "windows": GPTConfig.modern(
        sequence_len=256, vocab_size=257, n_layer=4, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL"
    ),
    "classic": GPTConfig(sequence_len=256, vocab_size=257, n_layer=2, n_head=2, n_kv_head=2, n_embd=32),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_common_beginning_is_computed_once_and_changes_nothing(name):
    torch.manual_seed(1)
    network = GPT(CONFIGS[name])
    network.init_weights(smear=1.0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    rng, computed, examples = random.Random(1), [], []
    for _ in range(30):
        beginning = [0, *(rng.randrange(1, 257) for _ in range(rng.randint(20, 200)))]
        endings = [
            [rng.randrange(1, 257) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(2, 5))
        ]
        start = len(beginning) - rng.randrange(3)
        examples.append([Scored(beginning + e, start, len(beginning + e)) for e in endings])
    alone = [score_sequences(network, example, 0, 257, torch.device("cpu")) for example in examples]
    whole = network.hidden
    network.hidden = lambda idx, *rest: computed.append(idx.numel()) or whole(idx, *rest)  # type: ignore
    together = score_examples(network, examples, 0, 257, torch.device("cpu"))
    for found, expected in zip(together, alone, strict=True):
        assert [score.loss for score in found] == pytest.approx([s.loss for s in expected], abs=1e-5)
        assert [score.is_greedy for score in found] == [score.is_greedy for score in expected]
    assert sum(computed) < 0.6 * sum(len(scored.tokens) for example in examples for scored in example)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.set_num_threads(1)
    return opinionated_network()


def test_losses_are_those_of_single_sequences(model):
    rng = random.Random(0)
    sequences = []
    for _ in range(40):
        tokens = [0, *(rng.randrange(1, 257) for _ in range(rng.randint(1, 90)))]
        start = rng.randint(1, len(tokens) - 1)
        sequences.append(Scored(tokens, start, rng.randint(start + 1, len(tokens))))
    batched = score_sequences(model, sequences, 0, 257, torch.device("cpu"))
    for scored, found in zip(sequences, batched, strict=True):
        (single,) = score_sequences(model, [scored], 0, 257, torch.device("cpu"))
        assert found.loss == pytest.approx(single.loss, abs=1e-5)
        assert found.is_greedy == single.is_greedy


def test_batches_stay_within_the_memory_budget(model, monkeypatch):
    shapes = []

    def recording(idx):
        shapes.append(tuple(idx.shape))
        return model(idx)

    monkeypatch.setitem(core_scoring.PASS_BYTES, "cpu", 4 * 257 * 300)
    sequences = [Scored([1] * length, 1, length) for length in range(2, 100)]
    score_sequences(recording, sequences, 0, 257, torch.device("cpu"))
    assert sum(rows for rows, _ in shapes) == len(sequences)
    assert all(rows * width <= 300 for rows, width in shapes)
    assert shapes[0][1] == max(width for _, width in shapes), "the longest comes first"
