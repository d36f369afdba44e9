"""Reinforcement learning: the batch, the gradient, and what leaves the weights alone."""

from __future__ import annotations

import math

import pytest
import torch

from nanochat.checkpoint_manager import Checkpoint, list_steps
from nanochat.common import UserError
from nanochat.engine import Completion
from nanochat.metrics import read_metrics
from nanochat.rl import Group, Surrogate, log_probabilities, policy_batch
from tests.easy_reward import is_even
from tests.toy_model import random_model
from tests.training import largest_difference, run_here, weights


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


def test_the_loss_of_the_first_update_has_the_gradient_of_reinforce():
    model = random_model("modern")
    rows = [([1, 2], completion([3, 4], [1, 1]), 0.75), ([1, 2], completion([5], [1]), -0.25)]
    inputs, targets, advantages = policy_batch(rows, pad=0, device=torch.device("cpu"))
    found = []
    for surrogate in (None, Surrogate(), Surrogate(3, clip=0.2), Surrogate(kl=0.5, reference=model)):
        now = log_probabilities(model, inputs, targets)
        reference = now.detach() if surrogate and surrogate.kl else None
        losses = (
            surrogate.loss(now, now.detach(), reference, advantages)
            if surrogate
            else -now * advantages[:, None]
        )
        (losses * (targets >= 0)).sum().backward()
        found.append(model.lm_head.weight.grad.clone())
        model.zero_grad()
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, atol=1e-6, rtol=1e-5)


def test_a_token_that_moved_far_enough_stops_to_count():
    now = torch.tensor([[0.5, 0.1, -0.5], [0.5, 0.1, -0.5]], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0])
    Surrogate(2, clip=0.2).loss(now, torch.zeros(2, 3), None, advantages).sum().backward()
    # up is no longer rewarded beyond 1.2, down no longer beyond 0.8; ways back always count
    assert now.grad is not None
    assert (now.grad == 0).tolist() == [[True, False, False], [False, False, True]]
    ratio = now.detach().exp()
    torch.testing.assert_close(now.grad[0, 1:], -ratio[0, 1:])


def test_the_divergence_is_estimated_without_bias_and_pulls_back():
    torch.manual_seed(0)
    ours, theirs = torch.randn(5).log_softmax(0), torch.randn(5).log_softmax(0)
    drawn = torch.multinomial(ours.exp(), 200_000, replacement=True)
    nothing = torch.zeros(1)
    estimate = Surrogate(kl=1.0, reference=random_model("classic")).loss(
        ours[drawn][None], ours[drawn][None], theirs[drawn][None], nothing
    )
    assert estimate.min() >= 0
    assert estimate.mean().item() == pytest.approx((ours.exp() * (ours - theirs)).sum().item(), rel=0.02)
    now = torch.tensor([[-1.0]], requires_grad=True)
    loss = Surrogate(kl=1.0, reference=random_model("classic")).loss(
        now, now.detach(), torch.tensor([[-2.0]]), nothing
    )
    loss.sum().backward()
    assert now.grad is not None and now.grad.item() > 0, "more likely than under the reference: down with it"


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


@pytest.fixture
def rewarded(tiny_run, monkeypatch):
    """A base folder with a model after mid-training that is right about half of the time."""
    monkeypatch.setattr("tasks.gsm8k.GSM8K.reward", is_even)
    run_here("base_train", num_iterations=1, eval_every=-1)
    run_here("mid_train", num_iterations=1, eval_every=-1)
    return tiny_run


def test_several_clipped_updates_with_a_reference_run_and_change_the_weights(rewarded):
    run_here("chat_rl", source="mid", eval_every=-1, num_updates=2, clip=0.2, kl=0.1)
    before, after = (weights(rewarded / f"{stage}_checkpoints" / "t") for stage in ("mid", "chatrl"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match="changes nothing with --num-updates=1"):
        run_here("chat_rl", source="mid", clip=0.2)


def test_a_run_that_is_rewarded_for_unit_tests(tiny_run, capsys):
    run_here("base_train", num_iterations=1, eval_every=-1)
    run_here("mid_train", num_iterations=1, eval_every=-1)
    run_here("chat_rl", source="mid", task="HumanEval", num_iterations=1, eval_examples=2)
    shown = capsys.readouterr().out
    assert "pass@1 0.0000" in shown and "pass@2 0.0000" in shown
    assert "Data: questions: 4\n" in shown and "Data: groups_skipped: 4\n" in shown


def test_precision_and_clipping_reach_the_update(rewarded):
    found, norms = {}, {}
    for name, flags in {
        "exact": {}, "loose": {"clip_norm": 1e3}, "tight": {"clip_norm": 1e-4}, "fp16": {"precision": "fp16"},
        "mxfp4": {"precision": "mxfp4"},
    }.items():  # fmt: skip
        run_here("chat_rl", source="mid", eval_every=-1, num_iterations=1, output_tag=name, **flags)
        directory = rewarded / "chatrl_checkpoints" / name
        found[name] = weights(directory)
        norms[name] = read_metrics(directory / "metrics.jsonl")[0]["train/grad_norm"]
    assert min(norms.values()) > 1e-3
    assert largest_difference(found["exact"], found["loose"]) == 0
    assert largest_difference(found["exact"], found["tight"]) > 0
    assert largest_difference(found["exact"], found["mxfp4"]) > 0
    state = Checkpoint.open(rewarded / "chatrl_checkpoints" / "fp16", 1).meta["loop_state"]
    assert state["loss_scale"] == 2.0**16 and state["skipped_steps"] == 0
    assert all(tensor.dtype == torch.float32 for tensor in found["fp16"].values())


def test_updates_that_are_not_finite_are_skipped_and_end_the_run_with_a_saved_state(rewarded, monkeypatch):
    from nanochat import rl

    whole = rl.log_probabilities
    monkeypatch.setattr(rl, "log_probabilities", lambda *inputs: whole(*inputs) * math.nan)
    monkeypatch.setattr("nanochat.training_run.MAX_SKIPPED_IN_A_ROW", 2)
    with pytest.raises(UserError, match="2 steps in a row gave no usable loss"):
        run_here("chat_rl", source="mid", eval_every=-1, num_iterations=9)
    directory = rewarded / "chatrl_checkpoints" / "t"
    assert list_steps(directory) == [2]
    before, after = weights(rewarded / "mid_checkpoints" / "t"), weights(directory)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_settings_do_not_continue_a_run(rewarded):
    run_here("chat_rl", source="mid", eval_every=-1, num_iterations=1)
    with pytest.raises(UserError, match=r"num_steps 1, not 2.*--resume=never"):
        run_here("chat_rl", source="mid", eval_every=-1, num_iterations=2)
    with pytest.raises(UserError, match=r"examples_per_step 4, not 2.*--resume=never"):
        run_here("chat_rl", source="mid", eval_every=-1, num_iterations=1, examples_per_step=2)
