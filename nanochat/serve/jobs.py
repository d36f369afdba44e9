"""One request between the endpoint that reads it and the worker that fills it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from nanochat.answer_parts import TEXT, Delta, PartsDecoder
from nanochat.sampling_params import SamplingParams
from nanochat.serve.errors import ApiError
from nanochat.tokenizer import RustBPETokenizer

# A reader slower than the model finds later text merged into one piece: 256 pieces bound its mailbox.
MAILBOX_PIECES = 256


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that the model considered, with its natural-log probability."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Scored:
    """A generated token with its log probability and the most likely ones at its place."""

    token: int
    logprob: float
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """A worker took the request."""

    worker: int


@dataclass(frozen=True, slots=True)
class Piece:
    """New content of one choice."""

    choice: int
    delta: Delta
    scores: tuple[Scored, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """One choice is complete: stop, length, cancelled or timeout."""

    choice: int
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The request as a whole came to nothing."""

    status: int
    code: str
    message: str


Item = Started | Piece | Ended | Failed


@dataclass(slots=True)
class Choice:
    """One answer of a request. The worker alone writes it."""

    params: SamplingParams
    decoder: PartsDecoder
    num_tokens: int = 0
    finish_reason: str | None = None


@dataclass(slots=True)
class Timings:
    """Clock readings in seconds (time.monotonic); None for what has not happened."""

    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None


class Job:
    """Prompts, the choices of each, and the mailbox through which a reader sees them grow.

    A chat has one prompt. With several, the choices come in their order, equally many for each. notes: fields for
    the response.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], choices: list[Choice], deadline_s: float,
        notes: dict[str, object] | None = None,
    ) -> None:  # fmt: skip
        assert prompts and len(choices) % len(prompts) == 0, (len(prompts), len(choices))
        self.id = secrets.token_urlsafe(18)
        self.prompts = [list(prompt) for prompt in prompts]
        self.choices, self.notes = choices, notes or {}
        self.timings = Timings()
        self.deadline = self.timings.submitted + deadline_s
        self.worker = -1
        self._items: deque[Item] = deque()
        self._arrived = asyncio.Event()

    def deliver(self, items: Sequence[Item]) -> None:
        """Put items into the mailbox, merging text when the reader lags."""
        for item in items:
            if len(self._items) < MAILBOX_PIECES or not self._merge(item):
                self._items.append(item)
        if items:
            self._arrived.set()

    def _merge(self, item: Item) -> bool:
        """Join a piece of text to the last item of its choice, if that is text too; whether it was."""
        for at in range(1, 1 + min(len(self._items), len(self.choices))):
            last = self._items[-at]
            if isinstance(last, Piece) and isinstance(item, Piece) and last.choice == item.choice:
                if last.delta.kind != TEXT or item.delta.kind != TEXT:
                    return False
                text = Delta(TEXT, last.delta.text + item.delta.text)
                self._items[-at] = Piece(last.choice, text, last.scores + item.scores)
                return True
        return False

    async def items(self, silence_s: float) -> AsyncGenerator[Item | None, None]:
        """Items in order until every choice ended or the job failed; None after each silent silence_s."""
        open_choices = len(self.choices)
        while open_choices:
            if not self._items:
                if not await self._wait(silence_s):
                    yield None
                continue
            item = self._items.popleft()
            open_choices -= isinstance(item, Ended)
            yield item
            if isinstance(item, Failed):
                return

    @property
    def has_items(self) -> bool:
        """Whether the reader would get an item without waiting."""
        return bool(self._items)

    async def wait_started(self, timeout_s: float) -> None:
        """Wait until a worker took the job; raise ApiError if it was refused. Gives up after timeout_s."""
        if not self._items and not await self._wait(timeout_s):
            return
        if isinstance(self._items[0], Failed):
            raise failure(self._items[0])

    async def _wait(self, timeout_s: float) -> bool:
        """Wait for items; whether some came in time. Without wait_for, which would start a task for every token."""
        self._arrived.clear()
        timer = asyncio.get_running_loop().call_later(timeout_s, self._arrived.set)
        try:
            await self._arrived.wait()
        finally:
            timer.cancel()
        return bool(self._items)

    # --- facts for responses

    def prompt_of(self, choice: int) -> list[int]:
        """The tokens that a choice continues."""
        return self.prompts[choice * len(self.prompts) // len(self.choices)]

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    def usage(self) -> dict[str, int]:
        """Token counts in the words of every API."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def speed(self) -> dict[str, float | None]:
        """Queue and first-token times in ms, and tokens per second after the first token."""
        t = self.timings
        queue = None if t.started is None else 1000 * (t.started - t.submitted)
        first = None if t.first_token is None else 1000 * (t.first_token - t.submitted)
        rate = None
        if t.first_token is not None and t.ended is not None and t.ended > t.first_token:
            rate = max(self.completion_tokens - len(self.choices), 0) / (t.ended - t.first_token)
        return {"queue_ms": _rounded(queue), "ttft_ms": _rounded(first), "tokens_per_second": _rounded(rate)}


def new_choice(
    tokenizer: RustBPETokenizer, params: SamplingParams, stop: Sequence[str] = (), raw: bool = False
) -> Choice:
    """A choice with a fresh decoder."""
    return Choice(params, PartsDecoder(tokenizer, stop, raw))


def failure(item: Failed) -> ApiError:
    """The HTTP error of a failed job."""
    retry_after = 1 if item.status in (429, 503) else None
    return ApiError(item.status, item.code, item.message, retry_after=retry_after)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
