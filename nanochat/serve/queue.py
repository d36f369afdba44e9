"""Requests that wait for a worker: first come, first served, bounded in number and in time."""

from __future__ import annotations

import asyncio
from collections import deque

from nanochat.serve.errors import ApiError
from nanochat.serve.jobs import Failed, Job


class JobQueue:
    """Used from the event loop alone."""

    def __init__(self, max_waiting: int, timeout_s: float) -> None:
        self._max_waiting, self._timeout_s = max_waiting, timeout_s
        self._waiting: deque[Job] = deque()
        self._timers: dict[Job, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def first(self) -> Job | None:
        """Who is next."""
        return self._waiting[0] if self._waiting else None

    def position(self, job: Job) -> int:
        """How many requests are before this one; 0 when it no longer waits."""
        return self._waiting.index(job) if job in self._timers else 0

    def put(self, job: Job) -> None:
        """Append a job; it fails with 503 when nobody takes it in time."""
        self._waiting.append(job)
        late = Failed(503, "queue_timeout", f"no worker was free for {self._timeout_s:g} s")
        self._timers[job] = asyncio.get_running_loop().call_later(self._timeout_s, self._refuse, job, late)

    def check_length(self) -> None:
        """Send the last job away with 429 if too many wait."""
        if len(self._waiting) > self._max_waiting:
            self.discard(self._waiting[-1])
            raise ApiError(
                429, "queue_full", f"{len(self._waiting)} requests are waiting already", retry_after=1
            )

    def discard(self, job: Job) -> bool:
        """Take a job out, to start or to forget it; whether it was there."""
        timer = self._timers.pop(job, None)
        if timer is None:
            return False
        timer.cancel()
        self._waiting.remove(job)
        return True

    def refuse_all(self, failed: Failed) -> None:
        """Nobody will ever take these jobs."""
        for job in list(self._waiting):
            self._refuse(job, failed)

    def _refuse(self, job: Job, failed: Failed) -> None:
        self.discard(job)
        job.deliver([failed])
