"""Reinforcement learning: the batch, the gradient, and what leaves the weights alone."""

from __future__ import annotations

import pytest
import torch

from nanochat.engine import Completion
from nanochat.metrics import read_metrics
from nanochat.rl import Group, policy_batch
from tests.toy_model import random_model
from tests.training import run_here, weights


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def completion(tokens, masks) -> Completion:
    return Completion(tokens, masks, "stop", ended_by_token=True, tool_calls=0)


def test_only_sampled_tokens_are_targets_and_the_ending_token_is_one():
    rows = [([1, 2], completion([3, 4, 5], [1, 0, 1]), 0.5), ([1], completion([9], [1]), -0.5)]
    inputs, targets, advantages = policy_batch(rows, pad=7, device=torch.device("cpu"))
    assert inputs.tolist() == [[1, 2, 3, 4], [1, 9, 7, 7]]
    assert targets.tolist() == [[-1, 3, -1, 5], [9, -1, -1, -1]]
    assert advantages.tolist() == [0.5, -0.5]


def test_gradient_is_the_analytic_policy_gradient():
    model = random_model("modern")
    rows = [([1, 2], completion([3, 4], [1, 1]), 0.75), ([1, 2], completion([5], [1]), -0.25)]
    inputs, targets, advantages = policy_batch(rows, pad=0, device=torch.device("cpu"))
    losses = model(inputs, targets, loss_reduction="none").view_as(targets)
    (losses * advantages[:, None]).sum().div(3).backward()
    ours = model.lm_head.weight.grad.clone()
    model.zero_grad()
    log_probability = 0
    for prompt, answer, advantage in rows:
        logits = model(torch.tensor([prompt + answer.tokens]))[0].log_softmax(-1)
        for position, token in enumerate(answer.tokens, start=len(prompt)):
            log_probability = log_probability + advantage * logits[position - 1, token]
    (-log_probability / 3).backward()
    torch.testing.assert_close(ours, model.lm_head.weight.grad, atol=1e-6, rtol=1e-4)


def test_advantages_are_relative_to_the_group():
    group = Group([1], [completion([2], [1])] * 4, [1.0, 0.0, 0.0, 1.0])
    assert group.advantages == [0.5, -0.5, -0.5, 0.5] and group.is_informative
    assert not Group([1], [completion([2], [1])] * 2, [1.0, 1.0]).is_informative


def test_equal_rewards_leave_the_weights_alone(tiny_run):
    """An untrained model is never right: every group is all zero."""
    run_here("base_train", num_iterations=1, eval_every=-1)
    run_here("mid_train", num_iterations=1, eval_every=-1)
    run_here("chat_rl", source="mid", eval_every=-1)
    before = weights(tiny_run / "mid_checkpoints" / "t")
    after = weights(tiny_run / "chatrl_checkpoints" / "t")
    assert all(torch.equal(before[name], after[name]) for name in before)
    events = read_metrics(tiny_run / "chatrl_checkpoints" / "t" / "metrics.jsonl")
    assert [e["informative_groups"] for e in events] == [0.0, 0.0]
