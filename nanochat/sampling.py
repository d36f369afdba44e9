"""From logits to token ids, for many rows with different settings at once.

Randomness is counter-based: the number drawn for a token depends only on the request's seed, its stream and
the token's position, never on what else is in the batch. B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

import ctypes
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
import torch

from nanochat.native import load_library
from nanochat.sampling_params import SamplingParams

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment


# --- randomness --------------------------------------------------------------------------------------


def stream_key(seed: int | None, stream: int = 0) -> int:
    """The 64-bit key of one random stream; samples of one request have streams 0, 1, 2, ..."""
    if seed is None:
        return secrets.randbits(64)
    return _mix(_mix(seed & _MASK64) + stream)


def uniforms(keys: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """float32 (B,) in [0, 1) for uint64 keys (B,) and step numbers (B,): the splitmix64 generator."""
    x = keys + steps.astype(np.uint64) * np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return ((x >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(np.float32)


def _mix(x: int) -> int:
    x = (x + _GOLDEN) & _MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)


# --- choosing ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that draw in the same way, and their settings as (rows, 1) tensors; None where no row uses one.

    Candidates are brought into descending order for rows with top_k or top_p only. A row must be treated alike in every
    company, or its seed would not give the same tokens; and which of several equal candidates are among the largest
    depends on how many are asked for. So their number is common to a group.
    """

    rows: torch.Tensor | None  # None: all
    is_ordered: bool
    num_candidates: int  # 0: the whole vocabulary
    temperature: torch.Tensor
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None

    @classmethod
    def of(cls, rows: list[int], params: Sequence[SamplingParams], device: torch.device) -> _Group:
        def column(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        members = [params[row] for row in rows]
        is_ordered, num_candidates = _order(members[0])
        return cls(
            rows=None if len(rows) == len(params) else torch.tensor(rows, device=device),
            is_ordered=is_ordered,
            num_candidates=num_candidates,
            temperature=column([p.temperature for p in members]),
            top_p=column([p.top_p for p in members]) if any(p.top_p < 1 for p in members) else None,
            min_p=column([p.min_p for p in members]) if any(p.min_p > 0 for p in members) else None,
        )


def _order(params: SamplingParams) -> tuple[bool, int]:
    """Whether a row's candidates must be in descending order, and how many of them there are; 0: all."""
    return bool(params.top_k) or params.top_p < 1, params.top_k or 0


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The settings of B rows, gathered on the device once for as long as the rows stay the same."""

    params: Sequence[SamplingParams]
    any_greedy: bool
    any_adjusted: bool  # by bias or penalties
    groups: Sequence[_Group]

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> SamplingBatch:
        """Sort the rows into groups that can be drawn together."""
        groups: dict[tuple[bool, int], list[int]] = {}
        for row, p in enumerate(params):
            if p.temperature > 0:
                groups.setdefault(_order(p), []).append(row)
        made = [_Group.of(rows, params, device) for rows in groups.values()]
        any_greedy = any(p.temperature == 0 for p in params)
        return cls(params, any_greedy, any(p.adjusts_logits for p in params), made)

    @property
    def all_greedy(self) -> bool:
        """Whether no row draws."""
        return not self.groups


def sample(
    logits: torch.Tensor,
    batch: SamplingBatch,
    uniform: torch.Tensor,
    histories: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
) -> torch.Tensor:
    """One id per row: logits (B, V) fp32, uniform (B,) in [0, 1) -> (B,) int64.

    Order: bias, penalties, top_k, temperature, softmax, min_p, top_p, renormalise, draw by inverting the
    distribution function. histories: prompt and generated ids of each row, for the penalties.
    """
    if batch.any_adjusted:
        logits = _adjusted(logits, batch.params, histories)
    if not batch.any_greedy and len(batch.groups) == 1:
        return _draw(logits, batch.groups[0], uniform)
    chosen = logits.argmax(dim=-1)
    for group in batch.groups:
        chosen[group.rows] = _draw(logits[group.rows], group, uniform[group.rows])
    return chosen


def fetch(ids: torch.Tensor) -> Callable[[], list[int]]:
    """Bring ids to the host; the function that is returned waits for them, and for nothing started later."""
    if ids.device.type != "cuda":
        return ids.tolist
    host, arrived = ids.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(ids.device))

    def wait() -> list[int]:
        arrived.synchronize()
        return host.tolist()

    return wait


def _draw(logits: torch.Tensor, group: _Group, uniform: torch.Tensor) -> torch.Tensor:
    size = logits.size(-1)
    count = group.num_candidates if group.num_candidates < size else 0
    library = load_library("cpu_sampling") if logits.device.type == "cpu" else None
    if library is not None and (count or not group.is_ordered):
        return _compiled_draw(library, logits.contiguous(), group, count, uniform.contiguous())
    ids = None
    if count:
        logits, ids = logits.topk(count, dim=-1)
    elif group.is_ordered:
        logits, ids = logits.sort(dim=-1, descending=True)
    probs = _probabilities(logits, group)
    # Back to the order of the vocabulary: another rounding, as of other company, swaps candidates that nearly tie, and
    # then the same draw would mean another token.
    if ids is not None and ids.size(-1) < size:
        ids, order = ids.sort(dim=-1)
        probs = probs.gather(1, order)
    elif ids is not None:
        probs, ids = torch.empty_like(probs).scatter_(1, ids, probs), None
    cumulative = probs.cumsum(dim=-1)
    # The first candidate whose cumulative probability exceeds the draw; it cannot have probability zero.
    choice = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    choice = choice.clamp_(max=cumulative.size(-1) - 1)
    return (choice if ids is None else ids.gather(1, choice)).squeeze(1)


def _compiled_draw(
    library: ctypes.CDLL, logits: torch.Tensor, group: _Group, count: int, uniform: torch.Tensor
) -> torch.Tensor:
    """The same on a processor, in one pass of cpu_sampling.cpp instead of a dozen operations."""
    chosen = torch.empty(len(logits), dtype=torch.int64)
    settings = [group.temperature, group.top_p, group.min_p, uniform]
    pointers = [c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in (*settings, chosen)]
    rows, size = logits.shape
    library.draw(c_void_p(logits.data_ptr()), c_int64(rows), c_int64(size), c_int64(count), *pointers)
    return chosen


def _probabilities(logits: torch.Tensor, group: _Group) -> torch.Tensor:
    probs = (logits / group.temperature).softmax(dim=-1)
    if group.min_p is not None:
        floor = group.min_p * probs.amax(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs < floor, 0)
    if group.top_p is not None:
        before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill((before >= group.top_p) & (group.top_p < 1), 0)
    return probs


def _adjusted(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    histories: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> torch.Tensor:
    """Bias and penalties. Row by row: they are rare, and their history lives on the host."""
    logits = logits.clone()
    for row, (p, (prompt, generated)) in enumerate(zip(params, histories, strict=True)):
        if not p.adjusts_logits:
            continue
        if p.logit_bias:
            logits[row, _index(p.logit_bias, logits)] += logits.new_tensor(list(p.logit_bias.values()))
        if p.repetition_penalty != 1 and (seen := _index({*prompt, *generated}, logits)).numel():
            old = logits[row, seen]
            logits[row, seen] = torch.where(old > 0, old / p.repetition_penalty, old * p.repetition_penalty)
        counts = Counter(generated)
        if counts and (p.presence_penalty or p.frequency_penalty):
            times = logits.new_tensor(list(counts.values()))
            logits[row, _index(counts, logits)] -= p.presence_penalty + p.frequency_penalty * times
    return logits


def _index(ids: Mapping[int, float] | set[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(ids), dtype=torch.long, device=like.device)


def top_logprobs(logits: torch.Tensor, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Natural-log probability of a token under logits (V,), and the `count` most likely (id, logprob)."""
    logprobs = logits.log_softmax(dim=-1)
    best = logprobs.topk(min(count, logits.size(-1)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return float(logprobs[token]), tuple(pairs)
