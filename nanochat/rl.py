"""The loop of reinforcement learning: sample groups of answers, weigh them, update.

What a step does is here; saving, resuming, evaluating, stopping and the update are training_run.py's, as for the
other stages.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from nanochat.checkpoint_manager import Checkpoint
from nanochat.common import World
from nanochat.engine import Completion, Engine, SamplingParams
from nanochat.fp8 import without_float8
from nanochat.gpt import GPT
from nanochat.metrics import MetricsLog, Value, duration, read_metrics
from nanochat.optim import MuonAdamW
from nanochat.report import get_report
from nanochat.stage import data_facts
from nanochat.tokenizer import RustBPETokenizer
from nanochat.training_run import RunPlan, TrainingRun


class RewardedTask(Protocol):
    """Conversations whose last assistant message is the reference, and a reward for an answer's text."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict: ...

    def reward(self, conversation: dict, completion: str, /) -> float: ...


@dataclass(frozen=True)
class Group:
    """The answers to one question. advantages = rewards - their mean."""

    prompt: list[int]
    answers: list[Completion]
    rewards: list[float]

    @property
    def advantages(self) -> list[float]:
        mean = sum(self.rewards) / len(self.rewards)
        return [reward - mean for reward in self.rewards]

    @property
    def is_informative(self) -> bool:
        """Whether the rewards differ; otherwise the group's gradient is exactly zero."""
        return min(self.rewards) != max(self.rewards)


@dataclass(frozen=True)
class GroupSampler:
    """Samples `num_samples` answers per question with the engine, all questions of a step in one batch."""

    engine: Engine
    tokenizer: RustBPETokenizer
    num_samples: int
    max_new_tokens: int
    temperature: float
    top_k: int

    def sample(self, task: RewardedTask, indices: Sequence[int], step: int) -> tuple[list[Group], int]:
        """Groups for these questions, and how many were cut to leave room for an answer.

        The seeds depend on step, question and sample only.
        """
        conversations = [task[i] for i in indices]
        room = self.engine.prompt_room(self.max_new_tokens)
        prompts, num_cut = self.tokenizer.completion_prompts(conversations, room)
        params = [
            SamplingParams(self.temperature, self.top_k, self.max_new_tokens, seed=_seed(step, i, sample))
            for i in indices
            for sample in range(self.num_samples)
        ]
        repeated = [prompt for prompt in prompts for _ in range(self.num_samples)]
        answers = self.engine.complete_many(repeated, params)
        texts = [self.tokenizer.decode(answer.content) for answer in answers]
        asked = [conversation for conversation in conversations for _ in range(self.num_samples)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # a reward may run code in the sandbox
            rewards = list(pool.map(task.reward, asked, texts))
        groups = []
        for i, prompt in enumerate(prompts):
            own = slice(i * self.num_samples, (i + 1) * self.num_samples)
            groups.append(Group(prompt, answers[own], rewards[own]))
        return groups, num_cut


def _seed(step: int, question: int, sample: int) -> int:
    return (step * 1_000_003 + question * 1_009 + sample) & 0x7FFFFFFF


@dataclass(frozen=True)
class Surrogate:
    """The loss on sampled answers. The default is REINFORCE, once per answer; the rest is there to be compared.

    num_updates: optimizer steps on the same answers. clip: how far a token's probability may move from the
    one it was sampled with before it stops to count [PPO, arXiv 1707.06347]; 0: any distance. kl: weight of the
    divergence from the reference model [GRPO, arXiv 2402.03300]; 0: no reference model.
    """

    num_updates: int = 1
    clip: float = 0.0
    kl: float = 0.0
    reference: GPT | None = None

    def __post_init__(self) -> None:
        assert self.num_updates >= 1 and self.clip >= 0 and self.kl >= 0, self
        assert (self.kl > 0) == (self.reference is not None), "a reference model belongs to kl > 0"

    def loss(
        self,
        log_probs: torch.Tensor,
        sampled_with: torch.Tensor,
        reference: torch.Tensor | None,
        advantages: torch.Tensor,
    ) -> torch.Tensor:
        """(B, T) loss per token from log-probabilities (B, T) now, at sampling, and of the reference; (B,)."""
        # where the two are equal, as in the first update, the gradient is that of log_probs * advantages
        ratio = (log_probs - sampled_with).exp()
        gain = ratio * advantages[:, None]
        if self.clip > 0:
            gain = torch.minimum(gain, ratio.clamp(1 - self.clip, 1 + self.clip) * advantages[:, None])
        if reference is None:
            return -gain
        away = reference - log_probs  # exp(x) - x - 1 is never negative and unbiased [Schulman 2020]
        return -gain + self.kl * (away.exp() - away - 1)


@dataclass(frozen=True, kw_only=True)
class RLPlan(RunPlan):
    """What the loop needs besides model, optimizer and task."""

    task: str
    examples_per_step: int  # over all ranks
    device_batch_size: int
    surrogate: Surrogate = Surrogate()

    @property
    def identity(self) -> dict[str, Value]:
        return {**super().identity, "examples_per_step": self.examples_per_step, "task": self.task}


def train_rl(
    plan: RLPlan,
    world: World,
    model: GPT,
    tokenizer: RustBPETokenizer,
    optimizer: MuonAdamW,
    task: RewardedTask,
    sampler: GroupSampler,
    resume_from: Checkpoint | None,
) -> None:
    """Train until the schedule ends; saves before it evaluates. SIGTERM and Ctrl-C save and stop."""
    run = TrainingRun(plan, world, model, tokenizer, optimizer, resume_from)
    state, last_step = run.state, plan.schedule.num_steps

    def timed_step(log: MetricsLog) -> None:
        started = time.perf_counter()
        measured = _step(plan, run, task, sampler)
        state.step += 1
        state.total_training_time += time.perf_counter() - started
        log.log(state.step, {**measured, "total_training_time": state.total_training_time}, kind="train")
        left = duration(state.total_training_time / state.step * (last_step - state.step))
        run.status.show(
            f"step {state.step:04d}/{last_step:04d} | reward {measured['reward']:.4f}"
            f" | length {measured['sequence_length']:.1f} | {left} left",
            final=state.step == last_step,
        )

    run.go(timed_step, lambda: None)  # the questions of a step follow from its number
    if world.is_main:
        used = data_facts(data_used(read_metrics(plan.directory / "metrics.jsonl")))
        outcome = {
            "Number of iterations": last_step,
            "Skipped steps": state.skipped_steps,
            "Total training time": duration(state.total_training_time),
            **used,
            **state.results,
        }
        if plan.save:
            checkpoint = Checkpoint.open(plan.directory, last_step)
            get_report().log(section="Chat RL", data=[plan.settings, outcome], model=checkpoint)


def _step(plan: RLPlan, run: TrainingRun, task: RewardedTask, sampler: GroupSampler) -> dict[str, Value]:
    """Sample, weigh, update. Returns means over all ranks, and counts."""
    model, world, step = run.model, run.world, run.state.step
    first = step * plan.examples_per_step
    indices = [i % len(task) for i in range(first + world.rank, first + plan.examples_per_step, world.size)]
    model.eval()
    with without_float8(model):
        groups, num_cut = sampler.sample(task, indices, step)
    model.train()
    informative = [group for group in groups if group.is_informative]
    num_tokens = sum(sum(answer.masks) for group in informative for answer in group.answers)
    rewards = [reward for group in groups for reward in group.rewards]
    lengths = [len(answer.tokens) for group in groups for answer in group.answers]
    cut = sum(not answer.ended_by_token for group in groups for answer in group.answers)
    sums = [num_tokens, sum(rewards), sum(lengths), len(rewards), len(informative), len(groups), cut, num_cut]
    dtype = torch.float32 if world.device.type == "mps" else torch.float64  # which has no float64
    counts = world.sum(torch.tensor(sums, dtype=dtype, device=world.device))
    totals = counts.tolist()

    # With no informative group anywhere the gradient is zero, but Muon's momentum would still move the weights.
    batches = _batches(plan, model, run.tokenizer, informative) if totals[0] > 0 else []
    loss = norm = None
    for _ in range(plan.surrogate.num_updates if totals[0] > 0 else 0):
        loss, norm = run.update(_backward(plan, run, batches, totals[0]), counts[0])
    return {
        "reward": totals[1] / totals[3],
        "sequence_length": totals[2] / totals[3],
        "informative_groups": totals[4] / totals[5],
        "train/loss": loss,
        "train/grad_norm": norm,
        "train/lrm": plan.schedule.lr_multiplier(step),
        "data": {
            "questions": int(totals[5]),
            "questions_cut": int(totals[7]),  # on the left, to leave room for an answer
            "answers": int(totals[3]),
            "answers_cut": int(totals[6]),  # at --max-new-tokens
            "groups_skipped": int(totals[5] - totals[4]),  # all rewards were equal
            "tokens_supervised": int(totals[0]),
        },
    }


def data_used(events: Sequence[dict]) -> dict[str, int]:
    """What a run trained on, added up over the steps in its metrics, which a resumed run continues."""
    total: dict[str, int] = {}
    for event in events:
        for name, count in (event.get("data") or {}).items():
            total[name] = total.get(name, 0) + count
    return total


class PolicyBatch(NamedTuple):
    """A micro-batch of answers. Log-probabilities (B, T), 0 where the model did not choose."""

    inputs: torch.Tensor
    targets: torch.Tensor
    advantages: torch.Tensor
    sampled_with: torch.Tensor | None  # None: as the model is now
    reference: torch.Tensor | None


def _batches(plan: RLPlan, model: GPT, tokenizer: RustBPETokenizer, groups: list[Group]) -> list[PolicyBatch]:
    """All answers, those of similar length together."""
    rows = [
        (group.prompt, answer, advantage)
        for group in groups
        for answer, advantage in zip(group.answers, group.advantages, strict=True)
    ]
    rows.sort(key=lambda row: len(row[0]) + len(row[1].tokens))
    pad, device, surrogate = tokenizer.encode_special("<|assistant_end|>"), model.get_device(), plan.surrogate
    batches = []
    for start in range(0, len(rows), plan.device_batch_size):
        inputs, targets, weights = policy_batch(rows[start : start + plan.device_batch_size], pad, device)
        with torch.no_grad():
            now = log_probabilities(model, inputs, targets) if surrogate.num_updates > 1 else None
            reference = surrogate.reference
            away = None if reference is None else log_probabilities(reference, inputs, targets)
        batches.append(PolicyBatch(inputs, targets, weights, now, away))
    return batches


def log_probabilities(model: GPT, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(B, T) of the targets, 0 where they are -1. The engine samples from the same logits."""
    return -model(inputs, targets, loss_reduction="none").view_as(targets)


def _backward(plan: RLPlan, run: TrainingRun, batches: list[PolicyBatch], num_tokens: float) -> torch.Tensor:
    """Add up the policy gradient of all answers; returns this rank's part of the loss, 0-dim."""
    total = torch.zeros((), device=run.world.device)
    for batch in batches:
        now = log_probabilities(run.model, batch.inputs, batch.targets)
        sampled_with = now.detach() if batch.sampled_with is None else batch.sampled_with
        losses = plan.surrogate.loss(now, sampled_with, batch.reference, batch.advantages)
        loss = (losses * (batch.targets >= 0)).sum() / num_tokens
        (loss * run.state.loss_scale).backward()
        total += loss.detach()
    if not batches:  # other ranks have gradients; all take part in their sum
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    return total


def policy_batch(
    rows: Sequence[tuple[list[int], Completion, float]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """inputs and targets (B, T) int64, targets -1 wherever the model did not choose; advantages (B,)."""
    width = max(len(prompt) + len(answer.tokens) for prompt, answer, _ in rows)
    inputs = torch.full((len(rows), width), pad)
    targets = torch.full((len(rows), width), -1)
    for row, (prompt, answer, _) in enumerate(rows):
        ids = torch.tensor(prompt + answer.tokens)
        chosen = torch.tensor([0] * len(prompt) + answer.masks, dtype=torch.bool)
        inputs[row, : len(ids)] = ids
        targets[row, : len(ids)] = torch.where(chosen, ids, -1)
    advantages = torch.tensor([advantage for *_, advantage in rows])
    return inputs[:, :-1].to(device), targets[:, 1:].to(device), advantages.to(device)
