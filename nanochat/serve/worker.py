"""The server's side of a model's process: gives it requests, turns its tokens into answers, replaces it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import pickle
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from nanochat.answer_parts import TEXT, Delta
from nanochat.common import UserError
from nanochat.serve.jobs import Alternative, Ended, Failed, Item, Job, Piece, Scored, Started
from nanochat.serve.launcher import Launcher, ModelProcess
from nanochat.serve.protocol import (
    Cancel,
    Command,
    Generated,
    Loaded,
    LoadFailed,
    Memory,
    Refused,
    Stepped,
    Submit,
    Wanted,
    read_message,
)

logger = logging.getLogger("nanochat.serve")
MAX_RELOADS = 3  # in a row, without a finished answer between
END_S = 3.0  # for a process to end by itself
_LOST = Failed(500, "worker_failed", "the model failed while answering; please try again")
_CLOSED = Failed(503, "not_ready", "the server is shutting down")


@dataclass(slots=True)
class _Run:
    """A job that a process works on: the numbers of its open answers, and what ends it in time."""

    numbers: set[int] = field(default_factory=set)
    timer: asyncio.TimerHandle | None = None


class Worker:
    """One process after another, and the jobs that the current one runs. Used from the event loop alone.

    A process that says nothing for silence_s seconds while it has work is replaced. on_free is called when
    there is room for another job, on_change when the worker becomes usable and when it is given up.
    """

    def __init__(
        self, index: int, launcher: Launcher, silence_s: float, on_free: Callable[[], None],
        on_change: Callable[[], None],
    ) -> None:  # fmt: skip
        self.index, self.gone = index, False
        self.loaded: Loaded | None = None  # of the last process: facts outlive it
        self.error: Exception | None = None
        self.num_requests = self.num_failed = self.num_tokens = 0
        self.busy_s = 0.0
        self.tokens_per_second: float | None = None
        self.memory: Memory = dict.fromkeys(("kv_cache", "allocated", "reserved", "total"))
        self._launcher, self._silence_s, self._on_free, self._on_change = (
            launcher,
            silence_s,
            on_free,
            on_change,
        )
        self._process: ModelProcess | None = None
        self._writer: asyncio.StreamWriter | None = None  # while the process is usable
        self._numbers = itertools.count()
        self._answers: dict[int, tuple[Job, int]] = {}  # number: job and choice
        self._runs: dict[Job, _Run] = {}
        self._reloads = 0
        self._draining = False  # its process gets no more jobs, and is replaced after the last one
        self._silent_since: float | None = None  # None: it owes no message
        self._watchdog: asyncio.TimerHandle | None = None

    @property
    def usable(self) -> bool:
        return self._writer is not None

    @property
    def state(self) -> str:
        """idle, busy, loading or failed."""
        if self.gone:
            return "failed"
        return "loading" if not self.usable else "busy" if self._answers else "idle"

    @property
    def num_running(self) -> int:
        return len(self._answers)

    @property
    def num_free(self) -> int:
        """How many more answers the process could generate at once."""
        if not self.usable or self._draining or self.loaded is None:
            return 0
        return self.loaded.max_batch - len(self._answers)

    # --- the life of the process

    async def run(self) -> None:
        """Keep a process at work, until one cannot be started or too many end in a row."""
        try:
            while not self.gone:
                ended = await self._serve(self._launcher.take(self.index))
                if self._draining:
                    self._draining = False
                    continue
                self.error = self.error or RuntimeError(f"the process of the model {ended}")
                self._reloads += 1
                self.gone = self.loaded is None or self._reloads > MAX_RELOADS
                if not self.gone:
                    text = "the process of worker %d %s; start %d of %d"
                    logger.error(text, self.index, ended, self._reloads, MAX_RELOADS)
        finally:
            self.gone = True
            self._on_change()

    async def _serve(self, process: ModelProcess) -> str:
        """Exchange messages with a process until it ends; returns how it did."""
        self._process = process
        reader, writer = await asyncio.open_connection(sock=process.channel)
        try:
            while True:
                message = await read_message(reader)
                if isinstance(message, LoadFailed):
                    self.error = UserError(message.message)
                elif isinstance(message, Loaded):
                    self.loaded, self._writer, self.error = message, writer, None
                    self._on_change()
                    self._on_free()
                else:
                    self._silent_since = time.monotonic() if self._answers else None
                    self._take(message)
                await asyncio.sleep(0)  # whoever waits for these tokens goes first
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except asyncio.CancelledError:
            self._abort(_CLOSED)
            raise
        except Exception:  # a worker must outlive whatever a process says
            logger.exception("worker %d could not follow its process", self.index)
        finally:
            self._writer = self._silent_since = None
            self._abort(_LOST)
            writer.close()
            end = partial(process.end, END_S)
            ended = await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, end))
        return ended

    def reload(self) -> None:
        """Load the model anew, when the running answers are complete. Waiting requests wait for it."""
        self._draining = self.usable
        self._end_drained()

    def _end_drained(self) -> None:
        if self._draining and not self._answers and self._writer is not None:
            self._writer.close()  # at the end of its commands the process ends

    def _watch(self) -> None:
        """Replace a process that is stuck: nothing it was asked for can still be answered in time."""
        self._watchdog = None
        if self._silent_since is None or self._process is None:
            return
        left = self._silent_since + self._silence_s - time.monotonic()
        if left <= 0:
            logger.error("worker %d is stuck for %g s", self.index, self._silence_s)
            self._process.process.kill()
        else:
            self._watchdog = asyncio.get_running_loop().call_later(left, self._watch)

    def _tell(self, command: Command) -> None:
        if self._writer is not None:
            self._writer.write(pickle.dumps(command, pickle.HIGHEST_PROTOCOL))

    # --- jobs

    def start(self, job: Job) -> None:
        """Give a job to the process."""
        job.worker, job.timings.started = self.index, time.monotonic()
        self.num_requests += 1
        run = self._runs[job] = _Run()
        wanted = [
            Wanted(next(self._numbers), job.prompt_of(index), choice.params)
            for index, choice in enumerate(job.choices)
        ]
        for index, one in enumerate(wanted):
            self._answers[one.number] = (job, index)
            run.numbers.add(one.number)
        self._tell(Submit(wanted))
        loop = asyncio.get_running_loop()
        run.timer = loop.call_later(max(0.0, job.deadline - time.monotonic()), self.stop, job, "timeout")
        if self._silent_since is None:
            self._silent_since = time.monotonic()
        if self._watchdog is None:
            self._watch()
        job.deliver([Started(self.index)])

    def stop(self, job: Job, reason: str) -> None:
        """End what is still open of a job, if it runs here."""
        if job not in self._runs:
            return
        numbers = sorted(self._runs[job].numbers)
        self._tell(Cancel(numbers))
        job.deliver([item for number in numbers for item in self._end(number, reason)])
        self._on_free()
        self._end_drained()

    def _take(self, message: Refused | Stepped) -> None:
        at_start = len(self._answers)
        if isinstance(message, Refused):
            for job in {self._answers[n][0] for n in message.numbers if n in self._answers}:
                self._drop(job)
                job.deliver([Failed(400, "invalid_value", message.reason)])
        else:
            before = self.num_tokens
            for generated in message.generated:
                if generated.number in self._answers:
                    job, index = self._answers[generated.number]
                    job.deliver(self._items(job, index, generated))
            self.busy_s += message.step_s
            self.memory = message.memory or self.memory
            if self.num_tokens > before and message.step_s > 0:
                self.tokens_per_second = (self.num_tokens - before) / message.step_s
        if len(self._answers) < at_start:
            self._on_free()
            self._end_drained()

    def _items(self, job: Job, index: int, generated: Generated) -> list[Item]:
        items: list[Item] = list(self._pieces(job, index, generated))
        if generated.finish_reason is not None:
            items += self._end(generated.number, generated.finish_reason)
        return items

    def _pieces(self, job: Job, index: int, generated: Generated) -> Iterable[Item]:
        if generated.token is None or generated.is_terminal:
            return
        choice = job.choices[index]
        choice.num_tokens += 1
        self.num_tokens += 1
        job.timings.first_token = job.timings.first_token or time.monotonic()
        deltas, scores = choice.decoder.push(generated.token), _scores(generated)
        if scores and not deltas:
            deltas = [Delta(TEXT, "")]  # the reader still learns what was considered here
        for delta in deltas:
            yield Piece(index, delta, scores)
            scores = ()

    def _end(self, number: int, reason: str) -> list[Item]:
        job, index = self._answers.pop(number)
        choice, run = job.choices[index], self._runs[job]
        items: list[Item] = [Piece(index, delta) for delta in choice.decoder.flush()]
        choice.finish_reason = reason
        job.timings.ended = time.monotonic()
        if reason in ("stop", "length"):
            self._reloads = 0  # it works
        run.numbers.discard(number)
        if not run.numbers:
            self._drop(job)
        return [*items, Ended(index, reason)]

    def _drop(self, job: Job) -> None:
        run = self._runs.pop(job)
        if run.timer is not None:
            run.timer.cancel()
        for number in run.numbers:
            del self._answers[number]

    def _abort(self, failed: Failed) -> None:
        self.num_failed += len(self._runs)
        for job in list(self._runs):
            self._drop(job)
            job.deliver([failed])


def _scores(generated: Generated) -> tuple[Scored, ...]:
    if generated.logprob is None or generated.token is None:
        return ()
    top = tuple(Alternative(token, logprob) for token, logprob in generated.top_logprobs)
    return (Scored(generated.token, generated.logprob, top),)
