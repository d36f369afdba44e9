"""CORE: 22 in-context-learning tasks, centred accuracy, averaged. [DCLM, arXiv 2406.11794]

Every example becomes a few token sequences with a scored range each. Many examples share a forward pass:
their sequences are sorted by length, padded and cut into batches of a bounded number of logits. The result
is that of one example at a time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from nanochat.common import World, print0
from nanochat.core_bundle import CoreTask, Item, bundle_dir, load_items, load_tasks

CHUNK_EXAMPLES = 256  # prepared together, so that their sequences can be sorted by length
LENGTH_STEP = 32  # lengths are rounded up to it: few distinct shapes, or allocators fragment
LOGIT_BYTES = {"cuda": 4 << 30, "mps": 1 << 30, "cpu": 256 << 20}  # fp32 logits of one forward pass


class EvalModel(Protocol):
    """Token ids (B, T) to logits (B, T, V)."""

    def __call__(self, idx: torch.Tensor, /) -> torch.Tensor: ...


class TextTokenizer(Protocol):
    """What CORE needs of a tokenizer."""

    def get_bos_token_id(self) -> int: ...

    def get_vocab_size(self) -> int: ...

    def encode(self, text: list[str], prepend: int | None = None) -> list[list[int]]: ...


class Scored(NamedTuple):
    """A sequence and the positions [start, end) of the tokens that are scored; 1 <= start < end."""

    tokens: list[int]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """Result of one task; counts are over all ranks."""

    accuracy: float
    correct: list[bool]  # in the order of the shuffled examples
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


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all sequences share."""
    shortest = min(map(len, sequences))
    for position in range(shortest):
        if any(sequence[position] != sequences[0][position] for sequence in sequences):
            return position
    return shortest


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


class Score(NamedTuple):
    """Mean loss in nats over the scored tokens, and whether greedy decoding gives all of them."""

    loss: float
    is_greedy: bool


@torch.no_grad()
def score_sequences(
    model: EvalModel, sequences: Sequence[Scored], bos: int, vocab_size: int, device: torch.device
) -> list[Score]:
    """Scores of sequences of any lengths, in their order."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index].tokens))
    scores: dict[int, Score] = {}
    while order:  # the longest first, so that memory peaks at once or never
        width = padded_length(len(sequences[order[-1]].tokens))
        budget = LOGIT_BYTES.get(device.type, LOGIT_BYTES["cpu"])
        rows = max(1, budget // (4 * width * vocab_size))
        batch, order = order[-rows:], order[:-rows]
        found = _score_batch(model, [sequences[i] for i in batch], width, bos, device)
        scores.update(zip(batch, found, strict=True))
    return [scores[index] for index in range(len(sequences))]


def padded_length(length: int) -> int:
    """A sequence length rounded up to one of few."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def _score_batch(
    model: EvalModel, batch: list[Scored], width: int, bos: int, device: torch.device
) -> Iterator[Score]:
    inputs = torch.full((len(batch), width), bos, dtype=torch.int64)
    for row, scored in enumerate(batch):
        inputs[row, : len(scored.tokens)] = torch.tensor(scored.tokens)
    # all scored positions of the batch in one flat list: one gather, one transfer
    counts = [scored.end - scored.start for scored in batch]
    rows = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts))
    positions = torch.cat([torch.arange(scored.start, scored.end) for scored in batch])
    targets = inputs[rows, positions].to(device)
    predictions = model(inputs.to(device))[rows.to(device), positions.to(device) - 1].float()
    losses = F.cross_entropy(predictions, targets, reduction="none").cpu().split(counts)
    hits = (predictions.argmax(dim=-1) == targets).cpu().split(counts)
    for loss, hit in zip(losses, hits, strict=True):
        yield Score(loss.mean().item(), bool(hit.all()))


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
    # one entry per example, then the counts of truncated and merged sequences
    results = torch.zeros(len(items) + 2, dtype=torch.float32)
    mine = range(world.rank, len(items), world.size)
    for first in range(0, len(mine), CHUNK_EXAMPLES):
        chunk = mine[first : first + CHUNK_EXAMPLES]
        examples, num_merged = _prepare(tokenizer, items, chunk, task, bos)
        flat = [scored for example in examples for scored in example]
        if context is not None:
            results[-2] += sum(len(scored.tokens) > context for scored in flat)
            flat = [truncated(scored, context) for scored in flat]
        results[-1] += num_merged
        scores = iter(score_sequences(model, flat, bos, vocab_size, world.device))
        for index, example in zip(chunk, examples, strict=True):
            results[index] = is_correct(list(islice(scores, len(example))), items[index], task.kind)
    *correct, num_truncated, num_merged = world.sum(results.to(world.device)).tolist()
    return TaskOutcome(
        sum(correct) / len(items),
        [bool(value) for value in correct],
        min(task.num_fewshot, len(items) - 1),
        int(num_truncated),
        int(num_merged),
        time.perf_counter() - started,
    )


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

    Returns `results` and `centered_results` by label, their mean `core_metric`, and `outcomes`
    (TaskOutcome by label). Prompts longer than the model's training context keep their end.
    """
    tasks = load_tasks(bundle or bundle_dir())
    config = getattr(model, "config", None)
    context = getattr(config, "sequence_len", None) or getattr(model, "max_seq_len", None)
    outcomes: dict[str, TaskOutcome] = {}
    for task in tasks:
        outcome = evaluate_task(model, tokenizer, load_items(task, max_per_task), task, world, context)
        outcomes[task.label] = outcome
        print0(_line(task, outcome))
    results = {label: outcome.accuracy for label, outcome in outcomes.items()}
    centered_results = {task.label: centered(results[task.label], task.baseline) for task in tasks}
    return {
        "results": results,
        "centered_results": centered_results,
        "core_metric": sum(centered_results.values()) / len(centered_results),
        "outcomes": outcomes,
    }


def _line(task: CoreTask, outcome: TaskOutcome) -> str:
    notes = [f"{outcome.num_truncated:,} prompts cut to the context"] if outcome.num_truncated else []
    notes += [f"{outcome.num_merged:,} prompts merged"] if outcome.num_merged else []
    shots = f"{outcome.num_fewshot}-shot"
    if outcome.num_fewshot < task.num_fewshot:
        shots += f" of {task.num_fewshot}"
    return (
        f"{task.label:<33} {shots}, {task.kind}, {len(outcome.correct):,} examples | "
        f"accuracy {outcome.accuracy:.4f} | centered {centered(outcome.accuracy, task.baseline):.4f} | "
        f"{outcome.seconds:.1f} s{''.join(f' | {note}' for note in notes)}"
    )
