"""The threads that generate: one per model replica, each stepping its engine over all requests it runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

import torch

from nanochat.engine import Event, Request
from nanochat.serve.jobs import Alternative, Choice, Ended, Failed, Item, Job, Piece, Scored, Started, send
from nanochat.serve.parts import TEXT, Delta
from nanochat.serve.queue import JobQueue
from nanochat.serve.settings import Replica

logger = logging.getLogger("nanochat.serve")
MEASURE_S = 1.0  # between looks at the memory of the device while it works
MAX_RELOADS = 3  # in a row, without a finished request between


class Worker:
    """A replica and its thread. Public attributes are read by the event loop for /health and /stats."""

    def __init__(
        self, index: int, load: Callable[[int], Replica], queue: JobQueue, on_change: Callable[[], None]
    ) -> None:
        self.index, self.state, self.gone = index, "loading", False
        self.replica: Replica | None = None
        self.error: Exception | None = None
        self.num_requests = self.num_failed = self.num_tokens = 0
        self.busy_s = 0.0
        self.tokens_per_second: float | None = None
        self.memory = device_memory("cpu")
        self._load, self._queue, self._on_change = load, queue, on_change
        self._running: dict[Request, tuple[Job, int]] = {}
        self._reloads = 0
        self.thread = threading.Thread(target=self._run, name=f"worker-{index}", daemon=True)

    @property
    def usable(self) -> bool:
        return self.state in ("idle", "busy")

    @property
    def num_running(self) -> int:
        return len(self._running)

    def _run(self) -> None:
        while not self._queue.closed:
            try:
                self.state = "loading"
                self.replica = self._load(self.index)
                self.state = "idle"
                self._on_change()
                self._serve(self.replica)
            except Exception as error:  # a worker must outlive whatever the model does
                self.error = error
                self.state = "failed"
                self._abort(
                    Failed(500, "worker_failed", "the model failed while answering; please try again")
                )
                if self.replica is None or self._reloads >= MAX_RELOADS:
                    break
                self._reloads += 1
                logger.exception("worker %d failed; reload %d of %d", self.index, self._reloads, MAX_RELOADS)
        self._abort(Failed(503, "not_ready", "the server is shutting down"))
        self._queue.leave(self.index)
        self.gone = True
        self._on_change()

    def _serve(self, replica: Replica) -> None:
        engine, measured = replica.engine, 0.0
        while True:
            if not self._running or time.monotonic() - measured > MEASURE_S:
                self.memory, measured = device_memory(replica.info.device), time.monotonic()
            free = engine.max_batch - len(self._running)
            jobs = self._queue.take(self.index, free, wait=not self._running)
            if jobs is None:
                return
            self.state = "busy" if self._running or jobs else "idle"
            begun, at_start = time.monotonic(), self.num_tokens
            for job in jobs:
                self._admit(replica, job)
            self._drop_dead(replica)
            if self._running:
                self._publish(engine.step())
            spent = time.monotonic() - begun
            self.busy_s += spent
            if self.num_tokens > at_start and spent > 0:
                self.tokens_per_second = (self.num_tokens - at_start) / spent

    def _admit(self, replica: Replica, job: Job) -> None:
        job.worker, job.timings.started = self.index, time.monotonic()
        self.num_requests += 1
        requests: list[Request] = []
        try:
            for index, choice in enumerate(job.choices):
                requests.append(replica.engine.submit(job.prompt_of(index), choice.params))
        except ValueError as error:  # the engine refuses the request itself; the replica is fine
            for request in requests:
                replica.engine.cancel(request)
            send([(job, [Failed(400, "invalid_value", str(error))])])
            return
        self._running.update((request, (job, index)) for index, request in enumerate(requests))
        send([(job, [Started(self.index)])])

    def _drop_dead(self, replica: Replica) -> None:
        """Cancel requests whose client is gone, whose time is up, or whose text hit a stop string."""
        now, news = time.monotonic(), []
        for request, (job, index) in list(self._running.items()):
            if job.cancelled:
                reason = "cancelled"
            elif job.choices[index].decoder.stopped:
                reason = "stop"
            elif now > job.deadline:
                reason = "timeout"
            else:
                continue
            replica.engine.cancel(request)
            news.append((job, self._end(request, reason)))
        send(news)

    def _publish(self, events: Iterable[Event]) -> None:
        news = []
        for event in events:
            if event.request in self._running:
                job, index = self._running[event.request]
                items: list[Item] = list(self._pieces(job, index, event))
                if event.finish_reason is not None:
                    items += self._end(event.request, event.finish_reason)
                news.append((job, items))
        send(news)

    def _pieces(self, job: Job, index: int, event: Event) -> Iterable[Item]:
        if event.token is None or event.is_terminal:
            return
        choice = job.choices[index]
        choice.num_tokens += 1
        self.num_tokens += 1
        job.timings.first_token = job.timings.first_token or time.monotonic()
        deltas, scores = choice.decoder.push(event.token), _scores(event)
        if scores and not deltas:
            deltas = [Delta(TEXT, "")]  # the reader still learns what was considered here
        for delta in deltas:
            yield Piece(index, delta, scores)
            scores = ()

    def _end(self, request: Request, reason: str) -> list[Item]:
        job, index = self._running.pop(request)
        choice: Choice = job.choices[index]
        items: list[Item] = [Piece(index, delta) for delta in choice.decoder.flush()]
        choice.finish_reason = reason
        job.timings.ended = time.monotonic()
        self._reloads = 0
        return [*items, Ended(index, reason)]

    def _abort(self, failed: Failed) -> None:
        jobs = {id(job): job for job, _ in self._running.values()}
        self._running.clear()
        self.num_failed += len(jobs)
        send([(job, [failed]) for job in jobs.values()])


def device_memory(device: str) -> dict[str, int | None]:
    """Bytes that tensors use, that this process holds, and that the device has; None where nobody counts.

    To be called by the worker's thread: a call into CUDA may wait for the device, and the event loop may not.
    """
    if not device.startswith("cuda"):
        return dict.fromkeys(("allocated", "reserved", "total"))
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "total": torch.cuda.get_device_properties(device).total_memory,
    }


def _scores(event: Event) -> tuple[Scored, ...]:
    if event.logprob is None or event.token is None:
        return ()
    top = tuple(Alternative(token, logprob) for token, logprob in event.top_logprobs)
    return (Scored(event.token, event.logprob, top),)
