"""CORE: 22 in-context-learning tasks, centred accuracy, averaged. [DCLM, arXiv 2406.11794]

Every example becomes a few token sequences with a scored range each; nanochat/core_scoring.py scores many at
once. The result is that of one example at a time.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from nanochat.common import World, print0
from nanochat.confidence import bootstrap_mean_of_tasks, wilson
from nanochat.core_bundle import CoreTask, Item, bundle_dir, load_items, load_tasks
from nanochat.core_scoring import EvalModel, Score, Scored, common_prefix_length, score_examples

CHUNK_EXAMPLES = 256  # prepared together, so that their sequences can be sorted by length
TEXT_CHARS = 200  # of an example in the log


class TextTokenizer(Protocol):
    """What CORE needs of a tokenizer."""

    def get_bos_token_id(self) -> int: ...

    def get_vocab_size(self) -> int: ...

    def encode(self, text: list[str], prepend: int | None = None) -> list[list[int]]: ...


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """Result of one task; counts are over all ranks."""

    accuracy: float
    correct: list[bool]  # in the order of the shuffled examples
    losses: list[list[float]]  # of each example's options: nats per scored token
    num_fewshot: int  # smaller than asked for if there are too few examples
    num_truncated: int = 0  # sequences longer than the model's context; they keep their last tokens
    num_merged: int = 0  # prompts whose tokens are no prefix of the prompt with continuation
    seconds: float = 0.0


# --- prompts and tokens ------------------------------------------------------------------------------


def fewshot_indices(index: int, num_items: int, num_fewshot: int) -> list[int]:
    """Which other examples precede example `index`; all of them if there are not enough."""
    count = min(num_fewshot, num_items - 1)
    # Sampling positions of the list without `index` is sampling that list, at a fraction of the cost.
    drawn = random.Random(1234 + index).sample(range(num_items - 1), count)
    return [position + (position >= index) for position in drawn]


def render_prompts(item: Item, shots: Sequence[Item], kind: str, delimiter: str) -> list[str]:
    """The prompts of an example: one per choice or context, or without and with the continuation."""
    if kind == "multiple_choice":
        head = "".join(f"{s['query']}{delimiter}{s['choices'][s['gold']]}\n\n" for s in shots)
        return [f"{head}{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if kind == "schema":
        head = "".join(f"{s['context_options'][s['gold']]}{delimiter}{s['continuation']}\n\n" for s in shots)
        return [f"{head}{context}{delimiter}{item['continuation']}" for context in item["context_options"]]
    head = "".join(f"{s['context'].strip()}{delimiter}{s['continuation']}\n\n" for s in shots)
    prompt = f"{head}{item['context'].strip()}{delimiter}"
    # stripped, or the delimiter's blank would merge with the continuation in one prompt and not in the other
    return [prompt.strip(), f"{prompt}{item['continuation']}"]


def scored_ranges(sequences: list[list[int]], kind: str) -> tuple[list[Scored], bool]:
    """What of each sequence is scored, never an empty range; and whether a prompt was no token prefix."""
    shortest = min(map(len, sequences))
    if kind == "multiple_choice":
        # If one option is the beginning of all others, its last token is scored rather than nothing.
        start = max(1, min(common_prefix_length(sequences), shortest - 1))
        return [Scored(tokens, start, len(tokens)) for tokens in sequences], False
    if kind == "schema":
        shared = common_prefix_length([tokens[::-1] for tokens in sequences])
        shared = max(1, min(shared, shortest - 1))
        return [Scored(tokens, len(tokens) - shared, len(tokens)) for tokens in sequences], False
    without, tokens = sequences
    shared = common_prefix_length(sequences)
    start = max(1, min(shared, len(tokens) - 1))
    return [Scored(tokens, start, len(tokens))], shared < len(without)


def truncated(scored: Scored, context: int) -> Scored:
    """The last `context` tokens, with the range moved along."""
    cut = max(0, len(scored.tokens) - context)
    return Scored(scored.tokens[cut:], max(1, scored.start - cut), scored.end - cut)


# --- scoring -----------------------------------------------------------------------------------------


def is_correct(scores: Sequence[Score], item: Item, kind: str) -> bool:
    """Whether the option of least loss is the right one; for language modeling, whether it is greedy."""
    if kind == "language_modeling":
        return scores[0].is_greedy
    losses = [score.loss for score in scores]
    return losses.index(min(losses)) == item["gold"]


def evaluate_task(
    model: EvalModel,
    tokenizer: TextTokenizer,
    items: Sequence[Item],
    task: CoreTask,
    world: World,
    context: int | None = None,
) -> TaskOutcome:
    """Accuracy on one task; rank r of w evaluates examples r, r+w, ... Collective."""
    started = time.perf_counter()
    bos, vocab_size = tokenizer.get_bos_token_id(), tokenizer.get_vocab_size()
    num_options = [_num_options(item, task.kind) for item in items]
    # per example whether it is right and the losses of its options; ranks fill in theirs
    results = torch.zeros(len(items), 1 + max(num_options), dtype=torch.float32)
    counts = torch.zeros(2, dtype=torch.float32)  # truncated and merged sequences
    mine = range(world.rank, len(items), world.size)
    for first in range(0, len(mine), CHUNK_EXAMPLES):
        chunk = mine[first : first + CHUNK_EXAMPLES]
        examples, num_merged = _prepare(tokenizer, items, chunk, task, bos)
        if context is not None:
            num_truncated = sum(len(scored.tokens) > context for example in examples for scored in example)
            examples = [[truncated(scored, context) for scored in example] for example in examples]
            counts[0] += num_truncated
        counts[1] += num_merged
        scored = score_examples(model, examples, bos, vocab_size, world.device)
        for index, scores in zip(chunk, scored, strict=True):
            results[index, 0] = is_correct(scores, items[index], task.kind)
            results[index, 1 : 1 + len(scores)] = torch.tensor([score.loss for score in scores])
    rows = world.sum(results.to(world.device)).tolist()
    num_truncated, num_merged = world.sum(counts.to(world.device)).tolist()
    return TaskOutcome(
        sum(row[0] for row in rows) / len(items),
        [bool(row[0]) for row in rows],
        [row[1 : 1 + count] for row, count in zip(rows, num_options, strict=True)],
        min(task.num_fewshot, len(items) - 1),
        int(num_truncated),
        int(num_merged),
        time.perf_counter() - started,
    )


def _num_options(item: Item, kind: str) -> int:
    fields = {"multiple_choice": "choices", "schema": "context_options"}
    return len(item[fields[kind]]) if kind in fields else 1


def _prepare(
    tokenizer: TextTokenizer, items: Sequence[Item], indices: Sequence[int], task: CoreTask, bos: int
) -> tuple[list[list[Scored]], int]:
    """The scored sequences of some examples, and how many had a prompt that was no token prefix."""
    prompts = []
    for index in indices:
        shots = [items[shot] for shot in fewshot_indices(index, len(items), task.num_fewshot)]
        prompts.append(render_prompts(items[index], shots, task.kind, task.delimiter))
    tokens = iter(tokenizer.encode([text for texts in prompts for text in texts], prepend=bos))
    ranges = [scored_ranges(list(islice(tokens, len(texts))), task.kind) for texts in prompts]
    return [scored for scored, _ in ranges], sum(is_merged for _, is_merged in ranges)


# --- the metric --------------------------------------------------------------------------------------


def centered(accuracy: float, baseline: float) -> float:
    """Accuracy on a scale where guessing is 0 and perfection 1."""
    return (accuracy - baseline) / (1 - baseline)


def evaluate_core(
    model: EvalModel,
    tokenizer: TextTokenizer,
    world: World,
    max_per_task: int = -1,
    bundle: Path | None = None,
) -> dict[str, Any]:
    """Evaluate all tasks of the bundle (default: that of the data source). Collective; prints on rank 0.

    Returns `results` and `centered_results` by label, their mean `core_metric`, `outcomes` (TaskOutcome by
    label), `examples` (a line of JSON for each), and 95 % intervals: `intervals` of the accuracies by label,
    `core_interval` of the mean. Prompts longer than the model's training context keep their end.
    """
    tasks = load_tasks(bundle or bundle_dir())
    config = getattr(model, "config", None)
    context = getattr(config, "sequence_len", None) or getattr(model, "max_seq_len", None)
    outcomes: dict[str, TaskOutcome] = {}
    lines: list[str] = []
    for task in tasks:
        items = load_items(task, max_per_task)
        outcome = evaluate_task(model, tokenizer, items, task, world, context)
        outcomes[task.label] = outcome
        lines += example_lines(task, items, outcome)
        print0(_line(task, outcome))
    results = {label: outcome.accuracy for label, outcome in outcomes.items()}
    centered_results = {task.label: centered(results[task.label], task.baseline) for task in tasks}
    intervals, core_interval = bootstrap_mean_of_tasks(
        [outcome.correct for outcome in outcomes.values()], [task.baseline for task in tasks]
    )
    return {
        "results": results,
        "centered_results": centered_results,
        "core_metric": sum(centered_results.values()) / len(centered_results),
        "outcomes": outcomes,
        "examples": lines,
        "intervals": dict(zip(outcomes, intervals, strict=True)),
        "core_interval": core_interval,
    }


def example_lines(task: CoreTask, items: Sequence[Item], outcome: TaskOutcome) -> list[str]:
    """What the model made of each example, as JSON: options by their losses, the chosen and the right one."""
    lines = []
    for index, (item, is_right, losses) in enumerate(
        zip(items, outcome.correct, outcome.losses, strict=True)
    ):
        line = {"task": task.label, "index": index, "correct": is_right, "losses": losses}
        if task.kind == "language_modeling":
            line |= {"text": item["context"].strip()[-TEXT_CHARS:], "gold": item["continuation"]}
        else:
            text = item["query"] if task.kind == "multiple_choice" else item["continuation"]
            line |= {"text": text[-TEXT_CHARS:], "chosen": losses.index(min(losses)), "gold": item["gold"]}
        lines.append(json.dumps(line, ensure_ascii=False))
    return lines


def _line(task: CoreTask, outcome: TaskOutcome) -> str:
    notes = [f"{outcome.num_truncated:,} prompts cut to the context"] if outcome.num_truncated else []
    notes += [f"{outcome.num_merged:,} prompts merged"] if outcome.num_merged else []
    shots = f"{outcome.num_fewshot}-shot"
    if outcome.num_fewshot < task.num_fewshot:
        shots += f" of {task.num_fewshot}"
    low, high = wilson(sum(outcome.correct), len(outcome.correct))
    return (
        f"{task.label:<33} {shots}, {task.kind}, {len(outcome.correct):,} examples | "
        f"accuracy {outcome.accuracy:.4f} ({low:.3f} to {high:.3f}) | centered {centered(outcome.accuracy, task.baseline):.4f} | "
        f"{outcome.seconds:.1f} s{''.join(f' | {note}' for note in notes)}"
    )
