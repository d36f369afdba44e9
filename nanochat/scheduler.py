"""Continuous batching: requests join and leave between steps, each step adds one token to every running row.

Running rows are always the first rows of one cache, so that finished ones cost nothing. New prompts are read
in together, padded to the longest; equal prompts are read once and copied. A row can call a tool; what the
tool answers is forced upon it, token by token, with mask 0.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from nanochat.gpt import GPT, ROTARY_FACTOR
from nanochat.kv_cache import ContextOverflow, KVCache
from nanochat.sampling import SamplingBatch, SamplingParams, sample, stream_key, top_logprobs, uniforms
from nanochat.tokenizer_base import Tokenizer

Tool = Callable[[str], "str | None"]

SLOT_STEP = 64  # cache lengths are multiples of this, so that growing is rare
PREFILL_TOKENS = 4096  # padded prompt tokens per step: bounds how long running rows wait for joining ones


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and what has been generated for it. masks: 1 = sampled by the model, 0 = forced."""

    prompt: tuple[int, ...]
    params: SamplingParams
    limit: int
    key: int
    tokens: list[int] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    ended_by_token: bool = False
    tool_calls: int = 0
    forced: deque[int] = field(default_factory=deque)
    in_call: bool = False
    call: list[int] = field(default_factory=list)


class Event(NamedTuple):
    """What a step did to one request: a new token, or (token None) its end without one.

    finish_reason is stop, length or cancelled on the request's last event. is_terminal marks the token that
    ended it, which is not part of the text.
    """

    request: Request
    token: int | None
    is_sampled: bool = False
    finish_reason: str | None = None
    is_terminal: bool = False
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class ToolBox:
    """The special tokens and the tool of the loop: expression tokens in, forced tokens out."""

    def __init__(self, tokenizer: Tokenizer, tools: Mapping[str, Tool]) -> None:
        self.tokenizer, self.tools = tokenizer, tools
        self.call_start, self.call_end = self._id("<|python_start|>"), self._id("<|python_end|>")
        self.output_start, self.output_end = self._id("<|output_start|>"), self._id("<|output_end|>")
        self.assistant_end = self._id("<|assistant_end|>")
        self.terminals = {self.assistant_end, tokenizer.get_bos_token_id()}
        self.outcomes: Counter[str] = Counter()

    def _id(self, name: str) -> int:
        try:
            token = self.tokenizer.encode_special(name)
        except KeyError:
            token = None
        return -1 if token is None else token  # a vocabulary without tools never emits -1

    def answer(self, call: Sequence[int]) -> list[int]:
        """Tokens to force after a call; none if the tool has no answer."""
        tool = self.tools.get("python")
        if tool is None or not call:
            return []
        try:
            text = tool(self.tokenizer.decode(call))
        except Exception:  # a tool is foreign code, and must not end the other rows
            self.outcomes["error"] += 1
            return []
        self.outcomes["ok" if text is not None else "rejected"] += 1
        if text is None:
            return []
        return [self.output_start, *self.tokenizer.encode(str(text)), self.output_end]


class Slots:
    """Rows of one growing cache. Row i belongs to the i-th running request."""

    def __init__(self, model: GPT, max_rows: int) -> None:
        self.model, self.max_rows = model, max_rows
        self.cache = self._allocate(0, 0)

    def _allocate(self, rows: int, length: int) -> KVCache:
        config, model = self.model.config, self.model
        head_dim = config.n_embd // config.n_head
        return KVCache(
            rows, config.n_kv_head, length, head_dim, config.n_layer, model.get_device(), model.compute_dtype
        )

    def reserve(self, rows: int, length: int) -> None:
        """Make room for rows of a length, doubling what is too small."""
        old = self.cache
        if rows <= old.batch_size and length <= old.max_seq_len:
            return
        if rows > old.batch_size:
            rows = max(rows, min(2 * old.batch_size, self.max_rows))
        if length > old.max_seq_len:
            length = max(length, min(2 * old.max_seq_len, ROTARY_FACTOR * self.model.config.sequence_len))
        rows, length = max(rows, old.batch_size), max(length, old.max_seq_len)
        new = self._allocate(rows, -(-length // SLOT_STEP) * SLOT_STEP)
        for source, target in ((old.k_cache, new.k_cache), (old.v_cache, new.v_cache)):
            target[:, : old.batch_size, : old.max_seq_len] = source
        new.positions[: old.batch_size] = old.positions
        if old.prev_embedding is not None:
            new.prev_embedding = old.prev_embedding.new_zeros(rows, *old.prev_embedding.shape[1:])
            new.prev_embedding[: old.batch_size] = old.prev_embedding
        self.cache = new

    def forward(self, first: int, last: int, ids: torch.Tensor, lengths: list[int] | None) -> torch.Tensor:
        """Run ids (last - first, T) through rows first..last; logits (rows, V) of each row's last real token.

        With lengths the rows start from nothing.
        """
        whole, part = self.cache, copy.copy(self.cache)
        part.k_cache, part.v_cache = whole.k_cache[:, first:last], whole.v_cache[:, first:last]
        fresh = lengths is not None
        part.positions = [0] * (last - first) if fresh else whole.positions[first:last]
        previous = whole.prev_embedding
        part.prev_embedding = None if fresh or previous is None else previous[first:last]
        logits = self.model.forward(ids, kv_cache=part, lengths=lengths, last_only=True)
        whole.positions[first:last] = part.positions
        if part.prev_embedding is not None:
            if whole.prev_embedding is None:
                shape = (whole.batch_size, *part.prev_embedding.shape[1:])
                whole.prev_embedding = part.prev_embedding.new_zeros(shape)
            whole.prev_embedding[first:last] = part.prev_embedding
        return logits[:, -1]

    def copy(self, sources: Sequence[int], first: int) -> None:
        """Make rows first, first + 1, ... equal to the source rows."""
        if not sources:
            return
        cache, last, rows = self.cache, first + len(sources), list(sources)
        filled = max(cache.positions[row] for row in rows)
        cache.k_cache[:, first:last, :filled] = cache.k_cache[:, rows, :filled]
        cache.v_cache[:, first:last, :filled] = cache.v_cache[:, rows, :filled]
        cache.positions[first:last] = [cache.positions[row] for row in rows]
        if cache.prev_embedding is not None:
            cache.prev_embedding[first:last] = cache.prev_embedding[rows]

    def longest(self, rows: int) -> int:
        return max(self.cache.positions[:rows], default=0)


class Scheduler:
    """Waiting and running requests over one cache. Not thread-safe: one thread submits, steps and cancels."""

    def __init__(self, model: GPT, toolbox: ToolBox, max_batch: int) -> None:
        self.model, self.toolbox, self.max_batch = model, toolbox, max_batch
        self.waiting: deque[Request] = deque()
        self._roomless: list[Request] = []  # those that may not generate anything
        self.running: list[Request] = []
        self.slots: Slots | None = None
        self._sampling: SamplingBatch | None = None
        self._keys = np.zeros(0, np.uint64)

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.running or self._roomless)

    def submit(self, tokens: Sequence[int], params: SamplingParams, stream: int = 0) -> Request:
        """Queue a request. Raises ValueError for a bad prompt, ContextOverflow for an impossible one."""
        prompt = tuple(tokens)
        limit = self._limit(prompt, params)
        request = Request(prompt, params, limit, stream_key(params.seed, stream))
        (self.waiting if limit else self._roomless).append(request)
        return request

    def _limit(self, prompt: tuple[int, ...], params: SamplingParams) -> int:
        config = self.model.config
        if not prompt:
            raise ValueError("the prompt is empty; it needs at least one token, such as <|bos|>")
        ids = [*prompt, *params.logit_bias]
        if not all(isinstance(token, int) and 0 <= token < config.vocab_size for token in ids):
            raise ValueError(f"token ids must be integers in [0, {config.vocab_size})")
        hard = ROTARY_FACTOR * config.sequence_len
        if len(prompt) > hard:
            raise ContextOverflow(f"the prompt has {len(prompt)} tokens, the model's positions end at {hard}")
        room = max(0, (hard if params.extend_context else config.sequence_len) - len(prompt))
        return room if params.max_tokens is None else min(room, params.max_tokens)

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """End a request at once and free its row; no event follows."""
        if request.finish_reason is not None:
            return
        request.finish_reason = "cancelled"
        if request.limit == 0:
            return
        if request in self.waiting:
            self.waiting.remove(request)
        else:
            self._drop_finished()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Add one token to every running request, after letting waiting ones in. Events in row order."""
        events = self._refuse_roomless()
        parts = [self._decode()] if self.running else []
        parts += [self._prefill(new)] if (new := self._admissible()) else []
        if not parts:
            return events
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        ids = self._sample(logits)
        events += [self._extend(row, token, logits) for row, token in enumerate(ids)]
        self._drop_finished()
        return events

    # --- joining and leaving -------------------------------------------------------------------------

    def _refuse_roomless(self) -> list[Event]:
        refused = [request for request in self._roomless if request.finish_reason is None]
        self._roomless.clear()
        for request in refused:
            request.finish_reason = "length"
        return [Event(request, None, finish_reason="length") for request in refused]

    def _admissible(self) -> list[Request]:
        """The next waiting requests for which there are rows and prefill budget; one, if a row is free."""
        free = self.max_batch - len(self.running)
        prompts: set[tuple[int, ...]] = set()
        longest = count = 0
        for request in islice(self.waiting, free):
            prompts.add(request.prompt)
            longest = max(longest, len(request.prompt))
            if count and len(prompts) * longest > PREFILL_TOKENS:
                break
            count += 1
        return [self.waiting.popleft() for _ in range(count)]

    def _prefill(self, joining: list[Request]) -> torch.Tensor:
        """Read the prompts into new rows; logits (len(joining), V) of their last tokens."""
        by_prompt: dict[tuple[int, ...], list[Request]] = {}
        for request in joining:
            by_prompt.setdefault(request.prompt, []).append(request)
        prompts = list(by_prompt)
        firsts = [requests[0] for requests in by_prompt.values()]
        copies = [(i, r) for i, requests in enumerate(by_prompt.values()) for r in requests[1:]]
        lengths = [len(prompt) for prompt in prompts]
        width, start = max(lengths), len(self.running)
        if self.slots is None:
            self.slots = Slots(self.model, self.max_batch)
        self.slots.reserve(start + len(joining), max(width + 1, self.slots.longest(start) + 1))
        padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
        ids = torch.tensor(padded, dtype=torch.long, device=self.model.get_device())
        logits = self.slots.forward(start, start + len(prompts), ids, lengths)
        sources = [i for i, _ in copies]
        self.slots.copy([start + i for i in sources], start + len(prompts))
        self.running += [*firsts, *(request for _, request in copies)]
        self._sampling = None
        return torch.cat([logits, logits[sources]]) if sources else logits

    def _decode(self) -> torch.Tensor:
        """Feed every running row its last token; logits (rows, V)."""
        assert self.slots is not None
        rows = len(self.running)
        self.slots.reserve(rows, self.slots.longest(rows) + 1)
        ids = [[request.tokens[-1]] for request in self.running]
        return self.slots.forward(0, rows, torch.tensor(ids, device=self.model.get_device()), None)

    def _drop_finished(self) -> None:
        """Close the gaps that finished requests leave by moving the last rows into them."""
        done = [row for row, request in enumerate(self.running) if request.finish_reason is not None]
        for row in reversed(done):
            last = len(self.running) - 1
            if row != last and self.slots is not None:
                self.slots.copy([last], row)
                self.running[row] = self.running[last]
            self.running.pop()
        if done:
            self._sampling = None

    # --- one token -----------------------------------------------------------------------------------

    def _sample(self, logits: torch.Tensor) -> list[int]:
        if self._sampling is None:
            self._sampling = SamplingBatch.of([r.params for r in self.running], logits.device)
            self._keys = np.array([r.key for r in self.running], np.uint64)
        if self._sampling.all_greedy:
            uniform = torch.empty(0)
        else:
            steps = np.array([len(r.tokens) for r in self.running])
            uniform = torch.from_numpy(uniforms(self._keys, steps)).to(logits.device)
        histories = [(r.prompt, r.tokens) for r in self.running]
        return sample(logits, self._sampling, uniform, histories).tolist()

    def _extend(self, row: int, sampled: int, logits: torch.Tensor) -> Event:
        request, tools = self.running[row], self.toolbox
        is_sampled = not request.forced
        token = sampled if is_sampled else request.forced.popleft()
        request.tokens.append(token)
        request.masks.append(int(is_sampled))
        if token in tools.terminals or token in request.params.stop_tokens:
            request.finish_reason, request.ended_by_token = "stop", True
        elif len(request.tokens) >= request.limit:
            request.finish_reason = "length"
        else:
            self._track_call(request, token)
        scores = (None, ())
        if is_sampled and request.params.logprobs is not None:
            scores = top_logprobs(logits[row], token, request.params.logprobs)
        return Event(request, token, is_sampled, request.finish_reason, request.ended_by_token, *scores)

    def _track_call(self, request: Request, token: int) -> None:
        tools = self.toolbox
        if token == tools.call_start:
            request.in_call, request.call = True, []
        elif request.in_call and token == tools.call_end:
            request.in_call = False
            request.tool_calls += 1
            request.forced.extend(tools.answer(request.call))
        elif request.in_call:
            request.call.append(token)
