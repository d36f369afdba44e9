"""Requests that wait for a worker: first come, first served, bounded in number and in time."""

from __future__ import annotations

import threading
import time
from collections import deque

from nanochat.serve.errors import ApiError
from nanochat.serve.jobs import Failed, Job, send


class JobQueue:
    """A bounded queue from the event loop to the worker threads."""

    def __init__(self, max_waiting: int, timeout_s: float, num_workers: int) -> None:
        self.closed = False
        self._max_waiting, self._timeout_s, self._num_workers = max_waiting, timeout_s, num_workers
        self._waiting: deque[Job] = deque()
        self._free: dict[int, int] = {}  # rows that each worker could start at once
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def position(self, job: Job) -> int:
        """How many requests are before this one; 0 when it no longer waits."""
        with self._changed:
            return self._waiting.index(job) if job in self._waiting else 0

    def put(self, job: Job) -> None:
        """Append a job, or refuse it: 429 when full, 503 when nobody will ever take it."""
        with self._changed:
            if self.closed or not self._num_workers:
                raise ApiError(503, "not_ready", "no model is available", retry_after=5)
            if len(self._waiting) >= self._max_waiting + sum(self._free.values()):
                raise ApiError(
                    429, "queue_full", f"{len(self._waiting)} requests are waiting already", retry_after=1
                )
            self._waiting.append(job)
            self._changed.notify()

    def take(self, worker: int, free: int, wait: bool) -> list[Job] | None:
        """Jobs for `free` rows in arrival order; with wait, sleep until there is one. None when closed."""
        with self._changed:
            self._prune()
            self._free[worker] = free
            while wait and not self._waiting and not self.closed:
                self._changed.wait()
            if self.closed:
                return None
            jobs: list[Job] = []
            while self._waiting and len(self._waiting[0].choices) <= free:
                jobs.append(self._waiting.popleft())
                free -= len(jobs[-1].choices)
            self._free[worker] = free
            return jobs

    def discard(self, job: Job) -> None:
        """Forget a job whose client is gone; one that is running is told to stop."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def leave(self, worker: int) -> None:
        """A worker gives up; when it was the last, every waiting job fails."""
        with self._changed:
            self._num_workers -= 1
            self._free.pop(worker, None)
            if not self._num_workers:
                self._refuse(list(self._waiting), Failed(503, "not_ready", "no model is available"))

    def close(self) -> None:
        """Wake all workers so that they end."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def _prune(self) -> None:
        oldest = time.monotonic() - self._timeout_s
        late = [job for job in self._waiting if job.timings.submitted < oldest]
        self._refuse(late, Failed(503, "queue_timeout", f"no worker was free for {self._timeout_s:g} s"))

    def _refuse(self, jobs: list[Job], failed: Failed) -> None:
        for job in jobs:
            self._waiting.remove(job)
        send([(job, [failed]) for job in jobs])
