"""Continuous batching: requests join and leave between steps, each step adds a token to every row that is ready.

Running requests are the rows of one cache. A row is ready when all its tokens but the last are cached; ready
rows come first, and take one step together. The others read their prompts, a chunk per step, so that nobody
waits long for a newcomer. A row has pages for the tokens it has; when the pool has none left, the youngest request
loses its row and goes back to the front of the line, with all its tokens; it reads them again later. What was read
stays in the prefix store as long as there is room, so that equal beginnings are read once. Equal prompts that wait
together are read once as a whole, and the row is copied.
A row can call a tool; what the tool answers is forced upon it, token by token, with mask 0. While a slow tool
works, its row stands still behind the others.
On a GPU the next step is started before the host has seen the tokens that it reads ("in flight"), so that the
GPU does not wait for Python: rows in flight are read as far as their last token, logits pending.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress
from itertools import islice

import numpy as np
import torch

from nanochat.answer_parts import PartsDecoder
from nanochat.common import ROTARY_FACTOR
from nanochat.kv_cache import ContextOverflow
from nanochat.page_pool import PAGE, CachedModel
from nanochat.prefix_store import PrefixStore, weights_version
from nanochat.requests import Event, Request, Sampler, ToolBox
from nanochat.row_cache import RowCache
from nanochat.sampling import (
    SamplingBatch,
    SamplingParams,
    fetch,
    sample,
    stream_key,
    top_logprobs,
    uniforms,
)
from nanochat.speculation import guess

PREFILL_TOKENS = 4096  # padded prompt tokens per step; on a processor only while no row is ready
SOON = 256  # new tokens of a request that memory is taken for before it begins
LOOK_AHEAD = 256  # waiting requests that are considered in one step
TOOL_WAIT_S = 0.05  # how long a step may wait for tools when there is nothing else to do


class Scheduler:
    """Waiting and running requests over one cache. Not thread-safe: one thread submits, steps and cancels.

    Rows and remembered beginnings share the memory of the store's pool, and so may several schedulers. speculate: tokens
    that are guessed ahead while a single request runs, see speculation.py; not where steps run ahead, whose decoder is
    faster than that.
    """

    def __init__(
        self, model: CachedModel, toolbox: ToolBox, max_batch: int, prefixes: PrefixStore, speculate: int = 0
    ) -> None:
        self.model, self.toolbox, self.max_batch, self.prefixes = model, toolbox, max_batch, prefixes
        self.pool = prefixes.pool
        self.chunk_tokens = self.pool.max_width
        # On a processor what a stream waits for a newcomer is no more than a chunk.
        self._busy_budget = PREFILL_TOKENS if self.pool.device.type == "cuda" else self.chunk_tokens
        self.cache = RowCache(model, max_batch, self.pool)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the i-th has row i
        self.num_preemptions = self.num_guessed = self.num_right = 0
        self.run_ahead = self.cache.can_run_ahead
        self.speculate = 0 if self.run_ahead else min(speculate, self.chunk_tokens - 1)
        self._flight: dict[Request, int] = {}  # rows of _flight_logits
        self._flight_logits = torch.empty(0)
        self._calling: list[Request] = []  # whose tools are at work
        self._roomless: list[Request] = []  # those that may not generate anything
        self._num_submitted = 0
        self._has_warned = False
        self._sample = Sampler()

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.running or self._roomless)

    def submit(self, tokens: Sequence[int], params: SamplingParams, stream: int = 0) -> Request:
        """Queue a request. Raises ValueError for a bad prompt, ContextOverflow for an impossible one."""
        prompt = tuple(tokens)
        limit = self._limit(prompt, params)
        beyond = len(prompt) + limit - self.model.config.sequence_len
        if params.extend_context and beyond > 0 and not self._has_warned:
            logging.getLogger(__name__).warning(
                "generating up to %d tokens beyond the trained context", beyond
            )
            self._has_warned = True
        self._num_submitted += 1
        text = PartsDecoder(self.toolbox.tokenizer, params.stop) if params.stop else None
        key = stream_key(params.seed, stream)
        request = Request(prompt, params, limit, key, self._num_submitted, text=text)
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
        limit = room if params.max_tokens is None else min(room, params.max_tokens)
        needed = self.pool.bytes_for(len(prompt) + limit)
        if limit and needed > self.pool.max_bytes:
            raise ContextOverflow(
                f"{len(prompt)} prompt and {limit} new tokens need {needed / 1e6:.1f} MB of key/value cache, "
                f"which may take {self.pool.max_bytes / 1e6:.1f} MB; ask for fewer tokens or allow more memory"
            )
        return limit

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """End a request at once and free its row; no event follows."""
        if request.finish_reason is not None:
            return
        request.finish_reason = "cancelled"
        if request.pending is not None:
            request.pending.cancel()
            request.pending = None
        if request in self.running:
            self._drop_finished()
        elif request in self.waiting:
            self.waiting.remove(request)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Add one token to every ready request and a chunk to others, after letting waiting ones in.

        Events in row order; none if only chunks of long prompts were read or only tools are at work. Where it fails,
        as when memory ends, all requests read their tokens again in later steps.
        """
        try:
            return self._step()
        except BaseException:
            self._start_over()
            raise

    def _start_over(self) -> None:
        """Send all rows back to the line: after half a step nobody knows what they hold."""
        requests = sorted(self.running, key=lambda request: -request.order)
        # One that was just about to begin still waits, and a row may have begun without its request.
        self.waiting.extendleft([r for r in requests if r.finish_reason is None and r not in self.waiting])
        self.running.clear()
        self._flight = {}
        while self.cache.positions:
            self.cache.remove_row(len(self.cache.positions) - 1)

    def _step(self) -> list[Event]:
        events = self._refuse_roomless()
        self._take_answers()
        self._call_back([row for row, request in enumerate(self.running) if request.pending is not None])
        self._make_room()
        self._admit()
        num_ready, num_active = self._arrange()
        if self.speculate and num_ready == 1 == len(self.running) and (draft := self._draft(self.running[0])):
            events += self._speculate(self.running[0], draft)
            self._drop_finished()
            return events
        parts, ready = [], self.running[:num_ready]
        if ready:
            parts.append(self._decode(num_ready))
        if num_ready < num_active:
            logits, finished = self._prefill(num_ready, num_active)
            parts.append(logits)
            ready = ready + finished
        if ready:
            logits = parts[0] if len(parts) == 1 else torch.cat(parts)
            chosen = self._sample(ready, logits)
            ids = fetch(chosen)
            if self.run_ahead and len(parts) == 1 and num_ready == len(self.running):
                self._take_off(chosen)
            rows = zip(ready, ids(), strict=True)
            events += [self._extend(request, token, logits, row) for row, (request, token) in enumerate(rows)]
        elif not events and num_active == 0:
            self._wait_for_tools()
        self._drop_finished()
        return events

    # --- joining and leaving -------------------------------------------------------------------------

    def _refuse_roomless(self) -> list[Event]:
        refused = [request for request in self._roomless if request.finish_reason is None]
        self._roomless.clear()
        for request in refused:
            request.finish_reason = "length"
        return [Event(request, None, finish_reason="length") for request in refused]

    def _reserve(self, more: int = 0) -> bool:
        """Give all rows pages for their tokens and some more, if need be in place of prefixes; False if there is no room."""
        tokens = [request.num_tokens + more for request in self.running]
        if self.cache.has_room(tokens):
            return True
        if not self.prefixes.make_room(self.cache.missing(tokens)):
            return False
        self.cache.extend(tokens)
        return True

    def _make_room(self) -> None:
        """Grow the running rows; where memory ends, the youngest give up theirs."""
        while self.running and not self._reserve():
            row = max(range(len(self.running)), key=lambda i: self.running[i].order)
            request = self.running[row]
            request.preemptions += 1
            self.num_preemptions += 1
            self.waiting.appendleft(request)
            self._remove(row)

    def _admit(self) -> None:
        """Give rows to waiting requests in their order, except to those that gain from a row being read now."""
        if not self.waiting or len(self.running) == self.max_batch:
            return
        self.prefixes.validate(weights_version(self.model))
        if self.run_ahead:
            self._grow_for_all()
        coming, whole = self._being_read()
        for request in list(islice(self.waiting, LOOK_AHEAD)):
            if len(self.running) >= self.max_batch:
                return
            tokens = request.num_tokens
            if request.pending is not None:
                continue
            names = request.block_names((tokens - 1) // PAGE)
            known = self.prefixes.match(names)
            if tuple(request.span(0, tokens)) in whole or (
                len(known) < len(names) and names[len(known)] in coming
            ):
                continue
            if not self._begin(request, known):
                if not self.running:  # each alone has room, see _limit
                    raise ContextOverflow("other generations of this engine have taken its key/value cache")
                return
            self.waiting.remove(request)
            if self._missing(len(self.running) - 1) > 1:  # or it reads no prompt that others could wait for
                coming |= set(names[len(known) :])
                whole.add(tuple(request.span(0, tokens)))

    def _grow_for_all(self) -> None:
        """Have pages for all that are about to run, where memory allows it.

        Growing little by little would lose the recorded steps each time.
        """
        wanted = self._wanted_soon()
        if self.pool.fits(wanted):
            # Others may have taken it, and what is needed now may still fit.
            with suppress(torch.OutOfMemoryError):
                self.pool.ensure(wanted)

    def _wanted_soon(self) -> list[int]:
        """Pages of each group that those who run, or are about to, will take."""
        soon = [*self.running, *islice(self.waiting, self.max_batch - len(self.running))]
        return self.cache.missing([r.num_tokens + min(r.limit - len(r.tokens), SOON) for r in soon])

    def _being_read(self) -> tuple[set[bytes], set[tuple[int, ...]]]:
        """Names of the blocks that running rows have yet to read, and all tokens of these rows."""
        coming: set[bytes] = set()
        whole = set()
        for request, position in zip(self.running, self.cache.positions, strict=True):
            if (tokens := request.num_tokens) - position > 1:
                coming.update(request.block_names(tokens // PAGE)[position // PAGE :])
                whole.add(tuple(request.span(0, tokens)))
        return coming, whole

    def _begin(self, request: Request, known: list[list[int]]) -> bool:
        """Give a request a row that starts with known blocks; False if there is no room for it."""
        if not self._room_for(request, known):
            known = []  # copies of what is remembered may have been in the way
            if not self._room_for(request, known):
                return False
        row = self.cache.add_row()
        request.weights = self.prefixes.version
        self.running.append(request)
        if known:
            filled = len(known) * PAGE
            self.cache.load(row, known, request.span(filled - 1, filled)[0])
            self.prefixes.tokens_reused += filled
        self.cache.extend([request.num_tokens], row)
        return True

    def _room_for(self, request: Request, known: list[list[int]]) -> bool:
        missing = self.cache.missing([request.num_tokens], len(self.running))
        shared = [0 if group.wraps else len(known) for group in self.pool.groups]
        return self.prefixes.make_room([m - s for m, s in zip(missing, shared, strict=True)], len(known))

    def _remove(self, row: int) -> None:
        self.prefixes.match(self.running[row].block_names(self.cache.positions[row] // PAGE))  # used just now
        self.cache.remove_row(row)
        last = self.running.pop()
        if row < len(self.running):
            self.running[row] = last

    def _drop_finished(self) -> None:
        """End the rows of finished requests; the last rows fill the gaps."""
        done = [row for row, request in enumerate(self.running) if request.finish_reason is not None]
        for row in reversed(done):
            self._remove(row)
        if done:
            with suppress(torch.OutOfMemoryError):  # which may need some in between, but nobody needs it now
                self.pool.shrink(self._wanted_soon() if self.run_ahead else ())

    # --- tools ---------------------------------------------------------------------------------------

    def _take_answers(self) -> None:
        """Let the rows go on whose tools are done."""
        for request in self._calling:
            if request.pending is not None and request.pending.done():
                self.toolbox.take_answer(request)
        self._calling = [request for request in self._calling if request.pending is not None]

    def _wait_for_tools(self) -> None:
        wait([r.pending for r in self._calling if r.pending is not None], TOOL_WAIT_S, FIRST_COMPLETED)

    # --- forward -------------------------------------------------------------------------------------

    def _missing(self, row: int) -> int:
        """Tokens of a row that are not in the cache."""
        return self.running[row].num_tokens - self.cache.positions[row]

    def _arrange(self) -> tuple[int, int]:
        """Move the ready rows, which miss at most one token, to the front and those that wait for a tool to the end.

        The number of ready rows, and of those that do not wait.
        """
        num_active = len(self.running)
        if self._calling:
            num_active = self._partition([request.pending is None for request in self.running])
        return self._partition([self._missing(row) <= 1 for row in range(num_active)]), num_active

    def _partition(self, wanted: list[bool]) -> int:
        """Move the wanted ones among the first rows before the others; their number."""
        front, back = 0, len(wanted) - 1
        while front <= back:
            if wanted[front]:
                front += 1
            elif not wanted[back]:
                back -= 1
            else:
                self.cache.swap_rows(front, back)
                self.running[front], self.running[back] = self.running[back], self.running[front]
                wanted[front], wanted[back] = wanted[back], wanted[front]
        return front

    def _decode(self, rows: int) -> torch.Tensor:
        """Read the last token of the first rows, unless that is in flight; logits (rows, V) after it."""
        ready, flying = self.running[:rows], [row for row in range(rows) if self._missing(row) == 0]
        if len(flying) == rows:
            order = [self._flight[request] for request in ready]
            logits = self._flight_logits
            logits = logits if order == list(range(len(logits))) else logits[order]
        else:  # tools have answered, or rows begun, meanwhile: rare enough to do it again
            self._call_back(flying)
            logits = self.cache.decode(rows, [(request.tokens or request.prompt)[-1] for request in ready])
        self._flight = {}
        for row, position in enumerate(self.cache.positions[:rows]):
            if position % PAGE == 0:
                self._publish(row, position - 1)
        return logits

    def _take_off(self, chosen: torch.Tensor) -> None:
        """Start reading the tokens chosen for all rows, which the host does not know yet, if nothing speaks against it."""
        longest = max(request.num_tokens for request in self.running) + 1
        done = all(len(request.tokens) + 1 >= request.limit for request in self.running)
        forced = any(request.forced for request in self.running)
        beyond = longest > ROTARY_FACTOR * self.model.config.sequence_len
        if done or forced or beyond or not self._reserve(1):
            return
        self._flight_logits = self.cache.decode(len(self.running), chosen)
        self._flight = {request: row for row, request in enumerate(self.running)}

    def _call_back(self, rows: list[int]) -> None:
        """Forget that the last token of some rows, where it is in flight, was read."""
        for row in rows:
            if self._missing(row) == 0:
                request, position = self.running[row], self.cache.positions[row] - 1
                self.cache.rewind(row, position, request.span(position - 1, position)[0])

    def _forward(self, first: int, counts: Sequence[int]) -> torch.Tensor:
        """Read so many more tokens of each of the rows from first on; logits (rows, V) after the last of each."""
        before = self.cache.positions[first : first + len(counts)]
        spans = [
            request.span(position, position + count)
            for request, position, count in zip(self.running[first:], before, counts, strict=False)
        ]
        logits = self.cache.read(first, spans)
        for row, position in enumerate(before, first):
            self._publish(row, position)
        return logits

    def _publish(self, row: int, before: int) -> None:
        """Put the blocks that a row has filled since it stood at `before` into the prefix store."""
        after = self.cache.positions[row]
        if before // PAGE == after // PAGE or self.running[row].weights != self.prefixes.version:
            return
        names = self.running[row].block_names(after // PAGE)
        new = [index for index in range(before // PAGE, after // PAGE) if names[index] not in self.prefixes]
        while new and not self.prefixes.make_room([len(new) * copies for copies in self.cache.block_copies]):
            new.pop()
        for index, block in zip(new, self.cache.blocks(row, new), strict=True):
            self.prefixes.add(names[index], block)

    def _prefill(self, first: int, end: int) -> tuple[torch.Tensor, list[Request]]:
        """Read a chunk of rows from first on; the requests that have been read whole, and their logits."""
        counts = self._chunk(first, end)
        logits = self._forward(first, counts)
        finished = [row for row in range(first, first + len(counts)) if self._missing(row) == 0]
        sources = [row - first for row in finished]
        requests = [self.running[row] for row in finished]
        for row in finished:
            for twin in self._twins(self.running[row]):
                self.cache.copy_row(row)
                self.waiting.remove(twin)
                twin.weights = self.running[row].weights
                self.running.append(twin)
                requests.append(twin)
                sources.append(row - first)
        return logits[sources], requests

    def _chunk(self, first: int, end: int) -> list[int]:
        """How many tokens each of the next rows reads: as many rows as token budget and positions allow."""
        budget = self._busy_budget if first else PREFILL_TOKENS
        end_of_positions = ROTARY_FACTOR * self.model.config.sequence_len
        width = start = 0
        counts = []
        for row in range(first, end):
            count = min(self._missing(row), self.chunk_tokens)
            width, start = max(width, count), max(start, self.cache.positions[row])
            left = budget - sum(counts)
            if left and self.cache.reads_ragged(first, [*counts, min(count, left)]):
                count = min(count, left)  # nothing is padded, so the budget can be used up
            elif counts and (width * (len(counts) + 1) > budget or start + width > end_of_positions):
                break
            counts.append(count)
        return counts

    def _twins(self, request: Request) -> list[Request]:
        """Waiting requests with the same tokens, as many as there is room for."""
        free = self.max_batch - len(self.running)
        tokens = request.span(0, request.num_tokens)
        line = islice(self.waiting, LOOK_AHEAD if free else 0)
        same = (
            r
            for r in line
            if r.num_tokens == len(tokens) and r.span(0, len(tokens)) == tokens and not r.pending
        )
        twins = list(islice(same, free))
        each = self.cache.copies(self.running.index(request))
        while twins and not self.prefixes.make_room([len(twins) * pages for pages in each]):
            twins.pop()
        return twins

    # --- several tokens at once ----------------------------------------------------------------------

    def _draft(self, request: Request) -> list[int]:
        """Guessed tokens of the only running request that there is room for."""
        if request.forced or request.params.adjusts_logits:  # penalties depend on the tokens before
            return []
        room = min(self.speculate, request.limit - len(request.tokens) - 1)
        draft = guess(request.span(0, request.num_tokens), room)
        return draft if draft and self._reserve(len(draft)) else []

    def _speculate(self, request: Request, draft: list[int]) -> list[Event]:
        """Read a request's last token and its draft, and keep what sampling confirms and one token more."""
        position = self.cache.positions[0]
        ids = [*request.span(position, request.num_tokens), *draft]
        logits = self.cache.forward_all(ids)
        batch = SamplingBatch.of([request.params] * len(ids), logits.device)
        steps = len(request.tokens) + np.arange(len(ids))
        uniform = torch.from_numpy(uniforms(np.full(len(ids), request.key, np.uint64), steps))
        events: list[Event] = []
        for row, token in enumerate(sample(logits, batch, uniform.to(logits.device)).tolist()):
            events.append(self._extend(request, token, logits, row))
            halted = request.finish_reason or request.forced or request.pending is not None
            if halted or draft[row : row + 1] != [token]:
                break
        self.num_guessed += len(draft)
        self.num_right += len(events) - 1
        self.cache.rewind(0, position + len(events), ids[len(events) - 1])
        self._publish(0, position)
        return events

    # --- one token -----------------------------------------------------------------------------------

    def _extend(self, request: Request, sampled: int, logits: torch.Tensor, row: int) -> Event:
        is_sampled, scores = self.toolbox.extend(request, sampled), (None, ())
        token = request.tokens[-1]
        if request.pending is not None:
            self._calling.append(request)
        if is_sampled and request.params.logprobs is not None:
            scores = top_logprobs(logits[row], token, request.params.logprobs)
        return Event(request, token, is_sampled, request.finish_reason, request.ended_by_token, *scores)
