"""A request for generation, what happens to it, and the tool that it may call."""

from __future__ import annotations

import functools
import os
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from nanochat.answer_parts import PartsDecoder
from nanochat.common import upload
from nanochat.page_pool import PAGE
from nanochat.prefix_store import block_names
from nanochat.sampling import SamplingBatch, SamplingParams, sample, uniforms
from nanochat.tokenizer_base import Tokenizer

Tool = Callable[[str], "str | None"]


@dataclass(frozen=True)
class SlowTool:
    """A tool that works in a thread while other rows go on; it should end by itself, as the sandbox does."""

    call: Tool

    def __call__(self, expression: str) -> str | None:
        return self.call(expression)


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and what has been generated for it. masks: 1 = sampled by the model, 0 = forced.

    limit is how many tokens it may get, order its place in the line, preemptions how often its memory was
    given to an older request for a while.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    limit: int
    key: int
    order: int = 0
    tokens: list[int] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    ended_by_token: bool = False
    tool_calls: int = 0
    preemptions: int = 0
    forced: deque[int] = field(default_factory=deque)
    in_call: bool = False
    call: list[int] = field(default_factory=list)
    pending: Future[str | None] | None = None  # the answer of a tool that is at work
    weights: int = 0  # their version when its row began
    text: PartsDecoder | None = None  # only where stop strings are to be found
    _names: list[bytes] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.prompt) + len(self.tokens)

    def span(self, first: int, last: int) -> Sequence[int]:
        """Tokens first to last of prompt and answer together."""
        split = len(self.prompt)
        if last <= split:
            return self.prompt[first:last]
        return [*self.prompt[first:], *self.tokens[max(0, first - split) : last - split]]

    def block_names(self, count: int) -> list[bytes]:
        """Names of the first `count` blocks of its tokens."""
        known = len(self._names)
        if count > known:
            fresh = self.span(known * PAGE, count * PAGE)
            self._names += block_names(fresh, PAGE, self._names[-1] if known else b"")
        return self._names[:count]


class Event(NamedTuple):
    """What a step did to one request: a new token, or (token None) its end without one.

    finish_reason is stop or length on the request's last event; a cancelled one has none. is_terminal marks the token that
    ended it, which is not part of the text.
    """

    request: Request
    token: int | None
    is_sampled: bool = False
    finish_reason: str | None = None
    is_terminal: bool = False
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses tokens for the same requests step after step; what depends only on who they are is made once."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._batch = SamplingBatch.of([], torch.device("cpu"))
        self._keys = np.zeros(0, np.uint64)

    def __call__(self, requests: list[Request], logits: torch.Tensor) -> torch.Tensor:
        """The next token of each request (B,), on the device of logits (B, V)."""
        if requests != self._requests:
            self._requests = requests
            self._batch = SamplingBatch.of([r.params for r in requests], logits.device)
            self._keys = np.array([r.key for r in requests], np.uint64)
        if self._batch.all_greedy:
            uniform = torch.empty(0)
        else:
            steps = np.array([len(r.tokens) for r in requests])
            uniform = upload(uniforms(self._keys, steps), logits.device)
        histories = [(r.prompt, r.tokens) for r in requests] if self._batch.any_adjusted else []
        return sample(logits, self._batch, uniform, histories)


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

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="tool")

    def extend(self, request: Request, sampled: int) -> bool:
        """Add a token to a request, the forced one if one is due; whether it was the sampled one.

        Sets what ends the request, and starts the tool that the token calls.
        """
        is_sampled = not request.forced
        token = sampled if is_sampled else request.forced.popleft()
        request.tokens.append(token)
        request.masks.append(int(is_sampled))
        if token in self.terminals or token in request.params.stop_tokens:
            request.finish_reason, request.ended_by_token = "stop", True
        elif request.text is not None and _hits_stop_string(request.text, token):
            request.finish_reason = "stop"
        elif len(request.tokens) >= request.limit:
            request.finish_reason = "length"
        else:
            self._track_call(request, token)
        return is_sampled

    def _track_call(self, request: Request, token: int) -> None:
        if token == self.call_start:
            request.in_call, request.call = True, []
        elif request.in_call and token == self.call_end:
            request.in_call = False
            request.tool_calls += 1
            request.pending = self._start(request.call)
            if request.pending is not None and request.pending.done():
                self.take_answer(request)
        elif request.in_call:
            request.call.append(token)

    def take_answer(self, request: Request) -> None:
        """Force upon a request what its tool, which is done, has answered."""
        assert request.pending is not None
        request.forced.extend(self._forced(request.pending))
        request.pending = None

    def _start(self, call: Sequence[int]) -> Future[str | None] | None:
        """The answer of the tool to a call, done already unless the tool is slow; None without tool or call."""
        tool = self.tools.get("python")
        if tool is None or not call:
            return None
        expression = self.tokenizer.decode(call)
        if isinstance(tool, SlowTool):
            return self._threads.submit(tool, expression)
        answer: Future[str | None] = Future()
        try:
            answer.set_result(tool(expression))
        except Exception as error:  # a tool is foreign code, and must not end the other rows
            answer.set_exception(error)
        return answer

    def _forced(self, answer: Future[str | None]) -> list[int]:
        """Tokens to force upon a row whose tool is done; none if it had no answer."""
        if answer.exception() is not None:
            self.outcomes["error"] += 1
            return []
        text = answer.result()
        self.outcomes["ok" if text is not None else "rejected"] += 1
        if text is None:
            return []
        return [self.output_start, *self.tokenizer.encode(str(text)), self.output_end]


def _hits_stop_string(text: PartsDecoder, token: int) -> bool:
    text.push(token)
    return text.stopped
