"""All workers behind one queue: what the application talks to."""

from __future__ import annotations

import time
from collections.abc import Callable

from nanochat.serve.errors import ApiError
from nanochat.serve.jobs import Job
from nanochat.serve.queue import JobQueue
from nanochat.serve.settings import Replica, Settings
from nanochat.serve.worker import Worker


class WorkerPool:
    """`num_workers` replicas made by `load(index)`, each in its own thread, fed from one queue.

    on_change is called from a worker's thread when it becomes usable and when it ends.
    """

    def __init__(
        self,
        load: Callable[[int], Replica],
        num_workers: int,
        settings: Settings,
        on_change: Callable[[WorkerPool], None] = lambda pool: None,
    ) -> None:
        self.queue = JobQueue(settings.max_queue, settings.queue_timeout, num_workers)
        self.workers = [
            Worker(index, load, self.queue, lambda: on_change(self)) for index in range(num_workers)
        ]
        self.started = time.monotonic()

    def start(self) -> None:
        """Start loading; returns at once."""
        for worker in self.workers:
            worker.thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """End all threads; running requests fail."""
        self.queue.close()
        for worker in self.workers:
            if worker.thread.is_alive():
                worker.thread.join(timeout_s)

    @property
    def ready(self) -> bool:
        return any(worker.usable for worker in self.workers)

    @property
    def failed(self) -> bool:
        """Whether no worker will ever be usable again."""
        return all(worker.gone and worker.error is not None for worker in self.workers)

    @property
    def status(self) -> str:
        """ok, loading, degraded (some workers gone) or failed."""
        if not self.ready:
            return "failed" if any(w.state == "failed" for w in self.workers) else "loading"
        return "degraded" if any(w.state == "failed" for w in self.workers) else "ok"

    @property
    def replica(self) -> Replica:
        """A loaded replica, for its tokenizer and model facts; 503 before the first one is loaded."""
        for worker in self.workers:
            if worker.replica is not None:
                return worker.replica
        raise ApiError(503, "not_ready", "the model is still loading", retry_after=2)

    def submit(self, job: Job) -> None:
        """Queue a job; raises ApiError 429 or 503."""
        self.queue.put(job)

    def cancel(self, job: Job) -> None:
        """Stop a job wherever it is. Harmless when it ended."""
        self.queue.discard(job)

    def health(self) -> dict:
        """The body of GET /health."""
        states = [worker.state for worker in self.workers]
        info = next((w.replica.info for w in self.workers if w.replica is not None), None)
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
        "device": worker.replica.info.device if worker.replica else None,
        "state": worker.state,
        "running": worker.num_running,
        "requests": worker.num_requests,
        "tokens": worker.num_tokens,
        "last_tok_per_sec": None if rate is None else round(rate, 1),
        **{f"memory_{name}_bytes": value for name, value in worker.memory.items()},
    }
