"""Scores of a chat model on the tasks: choosing a letter, or generating an answer that is checked.

Both forms run many problems in one forward pass, and give what one problem at a time would give.

    engine = Engine(model, tokenizer)
    scores = [evaluate_task(name, make_task(name), engine, world, EvalOptions()) for name in ALL_TASKS]
    chat_core({score.name: score.accuracy for score in scores}, ALL_TASKS)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from nanochat.common import UserError, World, print0
from nanochat.confidence import Interval, bootstrap_mean_of_tasks, wilson
from nanochat.core_eval import centered
from nanochat.core_scoring import padded_length
from nanochat.engine import Engine, SamplingParams
from nanochat.report_render import CHANCE
from nanochat.tokenizer_base import Tokenizer
from tasks.arc import ARC
from tasks.common import Task
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.spellingbee import SpellingBee

CATEGORICAL_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU")
FIVE_TASKS = (*CATEGORICAL_TASKS, "GSM8K", "HumanEval")  # the ChatCORE of the published scores
ALL_TASKS = (*FIVE_TASKS, "SpellingBee")
CHUNK_PROBLEMS = 512  # generated together; progress is shown in between


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """How to evaluate. Greedy by default; max_problems -1 is all of them.

    batch_size is in rows of the full context: prompts are short, so many more share a forward pass.
    """

    batch_size: int = 8
    num_samples: int = 1
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int | None = 50
    max_problems: int = -1


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Result of one task over all ranks. num_cut: prompts that had to lose their beginning to fit."""

    name: str
    passed: int
    total: int
    num_cut: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of problems solved; 0 if there were none."""
        return self.passed / self.total if self.total else 0.0

    @property
    def interval(self) -> Interval:
        """What the accuracy may be on other problems of the kind, 95 times out of 100."""
        return wilson(self.passed, self.total)

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return CHANCE[self.name]


def make_task(name: str) -> Task:
    """The test set of a task by its name in ALL_TASKS."""
    if name in ("ARC-Easy", "ARC-Challenge"):
        return ARC(name, "test")
    if name == "MMLU":
        return MMLU("all", "test")
    if name == "GSM8K":
        return GSM8K("main", "test")
    if name == "HumanEval":
        return HumanEval()
    if name == "SpellingBee":
        return SpellingBee(size=256, split="test")
    raise UserError(f"unknown task {name!r}; there are {', '.join(ALL_TASKS)}")


def evaluate_task(name: str, task: Task, engine: Engine, world: World, options: EvalOptions) -> TaskScore:
    """Score one task; rank r of w takes problems r, r+w, ... Collective."""
    started = time.perf_counter()
    count = len(task) if options.max_problems < 0 else min(len(task), options.max_problems)
    mine = range(world.rank, count, world.size)
    evaluate = _evaluate_categorical if task.eval_type == "categorical" else _evaluate_generative
    passed, num_cut = evaluate(name, task, mine, engine, options)
    totals = torch.tensor([passed, len(mine), num_cut], dtype=torch.int64, device=world.device)
    passed, total, num_cut = world.sum(totals).tolist()
    return TaskScore(name, passed, total, num_cut, time.perf_counter() - started)


def run_chat_eval(
    names: Sequence[str], engine: Engine, world: World, options: EvalOptions
) -> dict[str, TaskScore]:
    """Scores of several tasks by name, each printed on rank 0 as it comes. Collective."""
    scores = {}
    for name in names:
        score = scores[name] = evaluate_task(name, make_task(name), engine, world, options)
        cut = f", {score.num_cut} prompts cut" if score.num_cut else ""
        print0(
            f"{name}: {score.accuracy:.2%} ({score.passed}/{score.total}, 95 % interval "
            f"{score.interval.low:.1%} to {score.interval.high:.1%}, chance {score.chance:.0%}{cut}) "
            f"in {score.seconds:.1f} s"
        )
    return scores


def chat_core(accuracies: Mapping[str, float], tasks: Sequence[str] = ALL_TASKS) -> float | None:
    """Mean centred accuracy over the tasks (0 = guessing, 1 = perfect); None unless all were evaluated."""
    if not all(name in accuracies for name in tasks):
        return None
    return sum(centered(accuracies[name], CHANCE[name]) for name in tasks) / len(tasks)


def chat_core_interval(scores: Mapping[str, TaskScore], tasks: Sequence[str] = ALL_TASKS) -> Interval | None:
    """What ChatCORE may be on other problems of the same tasks, 95 times out of 100, by bootstrap; None as above."""
    if not all(name in scores and scores[name].total for name in tasks):
        return None
    answers = [
        [True] * score.passed + [False] * (score.total - score.passed)
        for score in (scores[name] for name in tasks)
    ]
    return bootstrap_mean_of_tasks(answers, [CHANCE[name] for name in tasks])[1]


# --- choosing a letter -------------------------------------------------------------------------------


@torch.no_grad()
def _evaluate_categorical(
    name: str, task: Task, indices: Sequence[int], engine: Engine, options: EvalOptions
) -> tuple[int, int]:
    """(passed, prompts cut): the letter with the highest logit after the prompt, the first one on ties."""
    model, tokenizer = engine.model, engine.tokenizer
    context, bos = model.config.sequence_len, tokenizer.get_bos_token_id()
    letter_ids: dict[str, int] = {}
    passed = num_cut = 0
    for chunk in _chunks(indices, CHUNK_PROBLEMS):
        conversations = [task[index] for index in chunk]
        prompts, cut = tokenizer.completion_prompts(conversations, context)
        num_cut += cut
        for batch in _batches_by_length(prompts, options.batch_size * context):
            width = min(padded_length(len(prompts[batch[-1]])), context)
            inputs = torch.full((len(batch), width), bos, dtype=torch.int64)
            for row, index in enumerate(batch):
                inputs[row, : len(prompts[index])] = torch.tensor(prompts[index])
            lengths = [len(prompts[index]) for index in batch]
            # causal: padding on the right cannot reach the position that is read
            logits = model(inputs.to(model.get_device()), lengths=lengths, last_only=True)[:, 0].cpu()
            for row, index in enumerate(batch):
                conversation = conversations[index]
                ids = [_letter_id(tokenizer, letter, letter_ids) for letter in conversation["letters"]]
                best = conversation["letters"][logits[row, ids].argmax().item()]
                passed += bool(task.evaluate(conversation, best))
    return passed, num_cut


def _batches_by_length(prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts of like length, shortest first, with at most max_tokens padded tokens."""
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
        if batch and (len(batch) + 1) * padded_length(len(prompts[index])) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _letter_id(tokenizer: Tokenizer, letter: str, known: dict[str, int]) -> int:
    if letter not in known:
        ids = tokenizer.encode(letter)
        if len(ids) != 1:
            raise UserError(
                f"the answer letter {letter!r} is {len(ids)} tokens; the tokenizer must keep it one"
            )
        known[letter] = ids[0]
    return known[letter]


# --- generating an answer ----------------------------------------------------------------------------


def _evaluate_generative(
    name: str, task: Task, indices: Sequence[int], engine: Engine, options: EvalOptions
) -> tuple[int, int]:
    """(passed, prompts cut): a problem is passed if any of its samples is right."""
    room = engine.prompt_room(options.max_new_tokens)
    passed = num_done = num_cut = 0
    for chunk in _chunks(indices, CHUNK_PROBLEMS):
        conversations = [task[index] for index in chunk]
        prompts, cut = engine.tokenizer.completion_prompts(conversations, room)
        num_cut += cut
        answers = _sample_answers(engine, prompts, chunk, options)
        passed += _count_passed(task, conversations, answers)
        num_done += len(chunk)
        if len(indices) > CHUNK_PROBLEMS and sys.stderr.isatty():
            print(f"\r{name}: {passed}/{num_done} of {len(indices)}", end="", file=sys.stderr, flush=True)
    return passed, num_cut


def _sample_answers(
    engine: Engine, prompts: Sequence[list[int]], indices: Sequence[int], options: EvalOptions
) -> list[list[str]]:
    """The texts of every problem's samples; the same ones however the problems are spread over ranks."""
    count = options.num_samples
    params = [
        SamplingParams(
            options.temperature, options.top_k, options.max_new_tokens, seed=42 + index * count + i
        )
        for index in indices
        for i in range(count)
    ]
    repeated = [prompt for prompt in prompts for _ in range(count)]
    completions = engine.complete_many(repeated, params)
    texts = [engine.tokenizer.decode(completion.content) for completion in completions]
    return [texts[start : start + count] for start in range(0, len(texts), count)]


def _count_passed(task: Task, conversations: Sequence[dict], answers: Sequence[Sequence[str]]) -> int:
    """Checking may run code in the sandbox, which takes its time: several at once."""
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        verdicts = pool.map(
            lambda pair: any(task.evaluate(pair[0], text) for text in pair[1]),
            zip(conversations, answers, strict=True),
        )
        return sum(verdicts)


def _chunks(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (indices[first : first + size] for first in range(0, len(indices), size))
