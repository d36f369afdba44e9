"""All workers behind one queue: what the application talks to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from nanochat.common import UserError
from nanochat.serve.errors import ApiError
from nanochat.serve.jobs import Failed, Job
from nanochat.serve.launcher import Launcher
from nanochat.serve.protocol import Loaded
from nanochat.serve.queue import JobQueue
from nanochat.serve.settings import Settings
from nanochat.serve.worker import Worker


class WorkerPool:
    """A worker for each process of the launcher, fed from one queue. Used from the event loop alone.

    on_change is called when a worker becomes usable and when it is given up.
    """

    def __init__(
        self,
        launcher: Launcher,
        settings: Settings,
        on_change: Callable[[WorkerPool], None] = lambda pool: None,
    ) -> None:
        self.queue = JobQueue(settings.max_queue, settings.queue_timeout)
        self._on_change = on_change
        self.workers = [
            Worker(index, launcher, settings.request_timeout, self._dispatch, self._changed)
            for index in range(launcher.count)
        ]
        self.started = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Let the workers look after their processes; returns at once."""
        self._tasks = [asyncio.create_task(worker.run()) for worker in self.workers]

    async def close(self) -> None:
        """End all processes; running and waiting requests fail."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reload(self) -> None:
        """Load the model anew in every worker, one that was trained meanwhile. Nothing that runs is cut."""
        for worker in self.workers:
            worker.reload()

    def _changed(self) -> None:
        if self.status == "failed":
            self.queue.refuse_all(Failed(503, "not_ready", "no model is available"))
        self._on_change(self)

    def _dispatch(self) -> None:
        """Start waiting jobs in their order, each where the fewest run."""
        while (job := self.queue.first) is not None:
            worker = max(self.workers, key=lambda worker: worker.num_free)
            if worker.num_free < len(job.choices):
                return
            self.queue.discard(job)
            worker.start(job)

    @property
    def ready(self) -> bool:
        return any(worker.usable for worker in self.workers)

    @property
    def num_running(self) -> int:
        """Answers that are being generated."""
        return sum(worker.num_running for worker in self.workers)

    @property
    def failed(self) -> bool:
        """Whether no worker will ever be usable again, or one of them never can be."""
        errors = [worker.error for worker in self.workers if worker.gone and worker.error is not None]
        return len(errors) == len(self.workers) or any(isinstance(error, UserError) for error in errors)

    @property
    def error(self) -> Exception | None:
        """Why a worker was given up."""
        return next(
            (worker.error for worker in self.workers if worker.gone and worker.error is not None), None
        )

    @property
    def status(self) -> str:
        """ok, loading, degraded (some workers gone) or failed."""
        num_gone = sum(worker.gone for worker in self.workers)
        if num_gone == len(self.workers):
            return "failed"
        return "loading" if not self.ready else "degraded" if num_gone else "ok"

    @property
    def replica(self) -> Loaded:
        """The tokenizer and the facts of the model; 503 before it is loaded for the first time."""
        for worker in self.workers:
            if worker.loaded is not None:
                return worker.loaded
        raise ApiError(503, "not_ready", "the model is still loading", retry_after=2)

    def check_alive(self) -> None:
        """503 when no worker will take anything again; while a process is replaced, requests wait for it."""
        if self.status == "failed":
            raise ApiError(503, "not_ready", "no model is available", retry_after=5)

    def submit(self, job: Job) -> None:
        """Queue a job; raises ApiError 429 or 503."""
        self.check_alive()
        self.queue.put(job)
        self._dispatch()
        self.queue.check_length()

    def cancel(self, job: Job) -> None:
        """Stop a job wherever it is, because nobody reads it any more. Harmless when it ended."""
        if not self.queue.discard(job) and job.worker >= 0:
            self.workers[job.worker].stop(job, "cancelled")

    def health(self) -> dict:
        """The body of GET /health."""
        states = [worker.state for worker in self.workers]
        info = next((w.loaded.info for w in self.workers if w.loaded is not None), None)
        return {
            "status": self.status,
            "ready": self.ready,
            "num_gpus": len(states),
            "available_workers": states.count("idle"),
            "model": info and info.name,
            "source": info and info.source,
            "step": info and info.step,
            "uptime_seconds": round(time.monotonic() - self.started, 1),
            "queue_depth": len(self.queue),
            "failed_workers": states.count("failed"),
        }

    def stats(self) -> dict:
        """The body of GET /stats without the session count."""
        states = [worker.state for worker in self.workers]
        return {
            "total_workers": len(states),
            "available_workers": states.count("idle"),
            "busy_workers": states.count("busy"),
            "queue_depth": len(self.queue),
            "requests_total": sum(worker.num_requests for worker in self.workers),
            "requests_failed": sum(worker.num_failed for worker in self.workers),
            "tokens_generated_total": sum(worker.num_tokens for worker in self.workers),
            "workers": [_worker_stats(worker) for worker in self.workers],
        }


def _worker_stats(worker: Worker) -> dict:
    rate = worker.tokens_per_second
    return {
        "gpu_id": worker.index,
        "device": worker.loaded.info.device if worker.loaded else None,
        "state": worker.state,
        "running": worker.num_running,
        "requests": worker.num_requests,
        "tokens": worker.num_tokens,
        "last_tok_per_sec": None if rate is None else round(rate, 1),
        **{f"memory_{name}_bytes": value for name, value in worker.memory.items()},
    }
