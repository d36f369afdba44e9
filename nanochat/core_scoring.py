"""Losses of token sequences under a model, many at once.

The sequences of an example (a question with each of its choices) mostly share a long beginning. Our own models
compute it once: its keys and values are kept, and each ending runs against them. Sequences and beginnings are
sorted by length, padded, and cut into batches of bounded memory. Logits are made at scored positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache

LENGTH_STEP = 32  # lengths are rounded up to it: few distinct shapes, or allocators fragment
PASS_BYTES = {"cuda": 4 << 30, "mps": 1 << 30, "cpu": 256 << 20}  # of one forward pass, roughly
MIN_SHARED = 32  # tokens; a shorter common beginning is cheaper to compute again


class EvalModel(Protocol):
    """Token ids (B, T) to logits (B, T, V)."""

    def __call__(self, idx: torch.Tensor, /) -> torch.Tensor: ...


class Scored(NamedTuple):
    """A sequence and the positions [start, end) of the tokens that are scored; 1 <= start < end."""

    tokens: list[int]
    start: int
    end: int


class Score(NamedTuple):
    """Mean loss in nats over the scored tokens, and whether greedy decoding gives all of them."""

    loss: float
    is_greedy: bool


class _Branching(NamedTuple):
    """An example whose sequences begin alike; the token before the first scored one is not in the beginning."""

    index: int
    sequences: Sequence[Scored]
    shared: int


def padded_length(length: int) -> int:
    """A sequence length rounded up to one of few."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all sequences share."""
    shortest = min(map(len, sequences))
    for position in range(shortest):
        if any(sequence[position] != sequences[0][position] for sequence in sequences):
            return position
    return shortest


@torch.no_grad()
def score_examples(
    model: EvalModel, examples: Sequence[Sequence[Scored]], bos: int, vocab_size: int, device: torch.device
) -> list[list[Score]]:
    """Scores of all sequences of every example, in their order."""
    found: list[list[Score]] = [[] for _ in examples]
    branching = _branching(examples) if isinstance(model, GPT) else []
    if isinstance(model, GPT):
        for batch in _branching_batches(model, branching, vocab_size, device):
            for example, scores in zip(batch, _score_branching(model, batch, bos, device), strict=True):
                found[example.index] = scores
    rest = sorted({*range(len(examples))} - {example.index for example in branching})
    scores = iter(_score_apart(model, [s for i in rest for s in examples[i]], bos, vocab_size, device))
    for index in rest:
        found[index] = [next(scores) for _ in examples[index]]
    return found


def score_sequences(
    model: EvalModel, sequences: Sequence[Scored], bos: int, vocab_size: int, device: torch.device
) -> list[Score]:
    """Scores of sequences that have nothing to do with each other, in their order."""
    examples = [[sequence] for sequence in sequences]
    return [scores[0] for scores in score_examples(model, examples, bos, vocab_size, device)]


# --- beginnings in common ----------------------------------------------------------------------------


def _branching(examples: Sequence[Sequence[Scored]]) -> list[_Branching]:
    found = []
    for index, example in enumerate(examples):
        if len(example) > 1:
            shared = common_prefix_length([scored.tokens for scored in example])
            # the last token before a scored one predicts it, so it belongs to the ending
            shared = min(shared, *(scored.start - 1 for scored in example))
            if shared >= MIN_SHARED:
                found.append(_Branching(index, example, shared))
    return found


def _branching_batches(
    model: GPT, examples: list[_Branching], vocab_size: int, device: torch.device
) -> Iterator[list[_Branching]]:
    """Examples of like beginnings, the longest first, so that memory peaks at once or never."""
    config, itemsize = model.config, model.compute_dtype.itemsize
    slot = 2 * config.n_layer * config.n_kv_head * config.head_dim * itemsize  # bytes of keys and values
    order = sorted(examples, key=lambda example: example.shared, reverse=True)
    while order:
        width = padded_length(order[0].shared)
        tail = max(_longest_tail(example) for example in order)
        row_bytes = (
            (width + tail) * slot + width * _pass_bytes_per_token(model, width) + 4 * vocab_size * tail
        )
        rows = max(1, _budget(device) // row_bytes)
        yield order[:rows]
        order = order[rows:]


def _longest_tail(example: _Branching) -> int:
    return max(len(scored.tokens) for scored in example.sequences) - example.shared


def _score_branching(
    model: GPT, batch: Sequence[_Branching], bos: int, device: torch.device
) -> list[list[Score]]:
    """The beginnings in one pass, then the first endings of all examples in one pass, the second ones, ..."""
    config, shared = model.config, [example.shared for example in batch]
    width, tail = padded_length(max(shared)), max(map(_longest_tail, batch))
    cache = KVCache(
        len(batch), config.n_kv_head, width + tail, config.head_dim, config.n_layer, device,
        model.compute_dtype,
    )  # fmt: skip
    beginnings = [example.sequences[0].tokens[: example.shared] for example in batch]
    model.hidden(_padded(beginnings, width, bos).to(device), cache, shared)
    embedding = cache.prev_embedding
    found: list[list[Score]] = [[] for _ in batch]
    for option in range(max(len(example.sequences) for example in batch)):
        rows = [row for row, example in enumerate(batch) if option < len(example.sequences)]
        endings = [[bos]] * len(batch)  # of the examples without such an option; nothing of it is read
        for row in rows:
            endings[row] = batch[row].sequences[option].tokens[shared[row] :]
        # what the option before wrote lies behind these positions, is masked and overwritten
        cache.positions, cache.prev_embedding = list(shared), embedding
        inputs = _padded(endings, max(map(len, endings)), bos)
        hidden = model.hidden(inputs.to(device), cache, [len(ending) for ending in endings])
        places = [
            (row, scored.start - shared[row], scored.end - shared[row])
            for row, scored in ((row, batch[row].sequences[option]) for row in rows)
        ]
        for row, score in zip(rows, _scores(hidden, inputs, places, model.logits), strict=True):
            found[row].append(score)
    return found


# --- one sequence at a time --------------------------------------------------------------------------


def _score_apart(
    model: EvalModel, sequences: Sequence[Scored], bos: int, vocab_size: int, device: torch.device
) -> list[Score]:
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index].tokens))
    scores: dict[int, Score] = {}
    while order:  # the longest first
        width = padded_length(len(sequences[order[-1]].tokens))
        row_bytes = 4 * width * vocab_size
        if isinstance(model, GPT):
            num_scored = max(sequences[i].end - sequences[i].start for i in order)
            row_bytes = width * _pass_bytes_per_token(model, width) + 4 * vocab_size * num_scored
        rows = max(1, _budget(device) // row_bytes)
        batch, order = order[-rows:], order[:-rows]
        inputs = _padded([sequences[i].tokens for i in batch], width, bos)
        places = [(row, sequences[i].start, sequences[i].end) for row, i in enumerate(batch)]
        if isinstance(model, GPT):
            found = _scores(model.hidden(inputs.to(device), None, None), inputs, places, model.logits)
        else:
            found = _scores(model(inputs.to(device)), inputs, places, torch.Tensor.float)
        scores.update(zip(batch, found, strict=True))
    return [scores[index] for index in range(len(sequences))]


# --- shared ------------------------------------------------------------------------------------------


def _budget(device: torch.device) -> int:
    return PASS_BYTES.get(device.type, PASS_BYTES["cpu"])


def _pass_bytes_per_token(model: GPT, width: int) -> int:
    """Of a forward pass without logits: twice the inside of an MLP in fp32, and a row of attention."""
    return 32 * model.config.n_embd + 4 * model.config.n_head * width


def _padded(rows: Sequence[Sequence[int]], width: int, pad: int) -> torch.Tensor:
    """(B, width) int64."""
    inputs = torch.full((len(rows), width), pad, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        inputs[row, : len(tokens)] = torch.tensor(tokens)
    return inputs


def _scores(
    states: torch.Tensor,
    inputs: torch.Tensor,
    places: Sequence[tuple[int, int, int]],
    to_logits: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[Score]:
    """A score per (row, start, end): states (B, T, X) become logits at the scored positions only."""
    # all scored positions of the batch in one flat list: one gather, one transfer
    counts = [end - start for _, start, end in places]
    rows = torch.cat([torch.full((end - start,), row) for row, start, end in places])
    positions = torch.cat([torch.arange(start, end) for _, start, end in places])
    targets = inputs[rows, positions].to(states.device)
    logits = to_logits(states[rows.to(states.device), positions.to(states.device) - 1])
    losses = F.cross_entropy(logits, targets, reduction="none").cpu().split(counts)
    hits = (logits.argmax(dim=-1) == targets).cpu().split(counts)
    for loss, hit in zip(losses, hits, strict=True):
        yield Score(loss.mean().item(), bool(hit.all()))
