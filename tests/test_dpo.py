"""Preferences: the pairs as batches, the loss, and runs that move the margin, resume, and read files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.checkpoint_manager import list_steps
from nanochat.common import UserError
from nanochat.dpo import PairData, PairLoader, Preference, evaluate_pairs
from nanochat.metrics import read_metrics
from tests.toy_data import BOS, ByteTokenizer, conversation, make_world
from tests.toy_model import random_model
from tests.training import run_here, weights

TOKENIZER = ByteTokenizer()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def pair(question: str, chosen: str, rejected: str):
    return conversation(question, chosen), conversation(question, rejected)


def ids(text: str) -> list[int]:
    return [ord(letter) + 1 for letter in text]


# --- data --------------------------------------------------------------------------------------------


def test_only_the_part_in_which_the_answers_differ_is_a_target():
    data = PairData(TOKENIZER, [pair("q", "abc", "abde")], 32)
    inputs, targets = next(PairLoader(data, 1, make_world()))
    assert data.seq_len == 32
    assert inputs[:, :6].tolist() == [[BOS, *ids("qab"), BOS, BOS], [BOS, *ids("qabd"), BOS]]
    assert targets[:, :6].tolist() == [[-1, -1, -1, *ids("c"), -1, -1], [-1, -1, -1, *ids("de"), -1]]


def test_long_pairs_are_cut_and_those_with_nothing_to_tell_apart_are_dropped_and_counted():
    alike, long_prompt = pair("q", "same", "same"), pair("q" * 40, "a", "b")
    cut = pair("q", "a" * 50, "b")
    data = PairData(TOKENIZER, [alike, long_prompt, cut, pair("q", "a", "b")], 32)
    loader = PairLoader(data, 1, make_world(), epochs=1)
    assert len(list(loader)) == 2
    stats = loader.stats()
    assert stats["pairs_dropped"] == 2 and stats["pairs_used"] == 2 and stats["pairs_truncated"] == 1
    assert stats["tokens_truncated"] == 52 - 33 and stats["tokens_supervised"] == 31 + 1 + 1 + 1
    assert stats["tokens_used"] + stats["tokens_padding"] == 4 * 33
    with pytest.raises(UserError, match="none of the 2 preference pairs"):
        PairData(TOKENIZER, [alike, long_prompt], 32)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 30), batch_size=st.integers(1, 5), size=st.integers(1, 3), epochs=st.integers(1, 3),
)  # fmt: skip
def test_every_pair_comes_once_per_epoch_on_some_rank(count, batch_size, size, epochs):
    data = PairData(TOKENIZER, [pair("q", f"a{i:02d}.", f"b{i:02d}.") for i in range(count)], 32)
    loaders = [PairLoader(data, batch_size, make_world(rank, size), epochs=epochs) for rank in range(size)]
    seen = []
    for batches in zip(*loaders, strict=True):
        for inputs, targets in batches:
            for chosen, rejected in zip(inputs[::2], targets[1::2], strict=True):
                if bool((rejected >= 0).any()):
                    seen.append(TOKENIZER.decode(chosen[3:5].tolist()))
    numbers = [int(text) for text in seen]
    for epoch in range(epochs):
        assert sorted(numbers[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert all(loader.stats() == loaders[0].stats() for loader in loaders)
    assert loaders[0].stats()["pairs_used"] == epochs * count


def test_a_loader_goes_on_where_its_state_was_taken():
    data = PairData(TOKENIZER, [pair("q", f"a{i}", f"b{i}") for i in range(7)], 32)
    straight = PairLoader(data, 2, make_world())
    for _ in range(5):
        next(straight)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = PairLoader(data, 2, make_world(), state=state)
    assert straight.epoch == 2
    for _ in range(6):
        assert torch.equal(next(straight)[0], next(resumed)[0])
    assert resumed.stats() == straight.stats()
    with pytest.raises(UserError, match="num_pairs was 7 and is now 1"):
        PairLoader(PairData(TOKENIZER, [pair("q", "a", "b")], 32), 2, make_world(), state=state)


# --- the loss ----------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_paper():
    data = PairData(TOKENIZER, [pair("q", "ab", "c"), pair("qq", "d", "efg")], 32)
    batch = next(PairLoader(data, 3, make_world(), shuffle=False, epochs=1))  # the third pair is padding
    model, reference = random_model(seed=1), random_model(seed=2)
    preference = Preference(reference, beta=0.3)

    def log_probability(network, prompt, answer):
        tokens = torch.tensor([[BOS, *ids(prompt + answer)]])
        logits = network(tokens)[0].log_softmax(-1)
        return sum(logits[i - 1, tokens[0, i]] for i in range(1 + len(prompt), tokens.size(1)))

    expected = torch.zeros(())
    for prompt, chosen, rejected in (("q", "ab", "c"), ("qq", "d", "efg")):
        rewards = [
            0.3 * (log_probability(model, prompt, a) - log_probability(reference, prompt, a))
            for a in (chosen, rejected)
        ]
        expected = expected - torch.nn.functional.logsigmoid(rewards[0] - rewards[1])
    found = preference.loss(model, *batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert int(preference.count(batch[1])) == 2


def test_the_source_model_prefers_nothing():
    data = PairData(TOKENIZER, [pair("q", "ab", "c"), pair("qq", "d", "efg")], 32)
    model = random_model()
    scores = evaluate_pairs(model, Preference(model, 0.1), data, 4, make_world())
    assert scores["val/margin"] == 0 and scores["val/accuracy"] == 0.5
    assert scores["val/loss"] == pytest.approx(math.log(2))


# --- runs --------------------------------------------------------------------------------------------


def held_out(directory) -> list[dict]:
    return [e for e in read_metrics(directory / "metrics.jsonl") if "val/margin" in e]


@pytest.fixture
def files(tiny_run):
    """Kind words are better than unkind ones: 40 pairs to learn from, 8 held out."""
    found = {}
    for name, numbers in (("data", range(40)), ("val_data", range(40, 48))):
        lines = [{"prompt": f"say {i}", "chosen": f"yes {i} please", "rejected": f"no {i}"} for i in numbers]
        path = tiny_run / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found[name] = str(path)
    return found


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_moves_the_margin_of_held_out_pairs_and_resumes_bit_for_bit(tiny_run, files, lora_rank):
    run_here("base_train", num_iterations=1, eval_every=-1)
    flags = files | {
        "source": "base",
        "lora_rank": lora_rank,
        "init_lr_frac": 1.0,
        "save_every": 3,
    }
    flags |= {"lora_lr": 0.2} if lora_rank else {}
    run_here("chat_dpo", **flags)
    directory = tiny_run / "chatdpo_checkpoints" / "t"
    straight, story = weights(directory), held_out(directory)
    assert story[0]["val/margin"] == 0 and story[0]["val/accuracy"] == 0.5
    # The head of a base model after one step is nearly zero, and adapters leave it as it is.
    assert story[-1]["val/margin"] > (0.01 if lora_rank else 0.5) and story[-1]["val/accuracy"] == 1.0
    assert straight.keys() == weights(tiny_run / "base_checkpoints" / "t").keys()
    assert list_steps(directory) == [3, 6]
    for path in directory.glob("*_000006.*"):
        path.unlink()
    run_here("chat_dpo", **flags)
    resumed = weights(directory)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    times = {"time"}
    assert [{k: v for k, v in e.items() if k not in times} for e in held_out(directory)] == [
        {k: v for k, v in e.items() if k not in times} for e in story
    ]


def test_word_problems_make_pairs_of_their_own(tiny_run, capsys):
    run_here("base_train", num_iterations=1, eval_every=-1)
    run_here("chat_dpo", source="base", num_iterations=1, max_pairs=16, max_val_pairs=8)
    shown = capsys.readouterr().out
    assert "Data: pairs_used: 8" in shown and "Data: tokens_supervised:" in shown and "val/margin" in shown


def test_numbers_that_do_not_go_together_are_refused(tiny_run, files):
    run_here("base_train", num_iterations=1, eval_every=-1)
    for changes, reason in (
        ({"pairs_per_step": 9}, "not a multiple"),
        ({"beta": 0.0}, "must be positive"),
        ({"val_data": ""}, "belong together"),
    ):
        with pytest.raises(UserError, match=reason):
            run_here("chat_dpo", **files | {"source": "base"} | changes)
