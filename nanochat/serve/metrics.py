"""Counters and histograms of the server in the Prometheus text format."""

from __future__ import annotations

from itertools import pairwise

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from nanochat.answer_parts import CALL, OUTPUT
from nanochat.serve.jobs import Job
from nanochat.serve.pool import WorkerPool
from nanochat.serve.settings import server_version

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)
_GENERATION_S = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = tuple(2**n for n in range(4, 14))
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The server's own registry: two servers in one process do not mix."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self.registry = registry = CollectorRegistry()
        PlatformCollector(registry=registry)
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"nanochat_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"nanochat_{name}", text, labels, buckets=buckets, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"nanochat_{name}", text, labels, registry=registry)

        self.requests = counter("http_requests", "HTTP responses", "method", "path", "status")
        self.duration = histogram(
            "http_request_duration_seconds", "Time to the end of a response", _GENERATION_S, "method", "path"
        )
        self.in_flight = gauge("requests_in_flight", "HTTP requests being answered")
        self.rejections = counter("queue_rejections", "Requests refused by the queue", "reason")
        self.disconnects = counter("client_disconnects", "Clients that left early", "endpoint")
        self.truncations = counter("context_truncations", "Prompts that lost old messages")
        self.tool_calls = counter("tool_calls", "Tool calls by the model", "tool", "outcome")
        self.websockets = gauge("websocket_connections", "Open WebSocket connections")
        self._generations = counter("generations", "Finished answers", "endpoint", "finish_reason")
        self._prompt = counter("prompt_tokens", "Tokens read", "endpoint")
        self._completion = counter("completion_tokens", "Tokens generated", "endpoint")
        self._queue_wait = histogram("queue_wait_seconds", "Time in the queue", _FIRST_TOKEN_S)
        self._first = histogram("time_to_first_token_seconds", "From submission on", _FIRST_TOKEN_S)
        self._per_token = histogram("time_per_output_token_seconds", "After the first", _PER_TOKEN_S)
        self._generation = histogram("generation_duration_seconds", "From start to end", _GENERATION_S)
        self._prompt_length = histogram("prompt_length_tokens", "Tokens per prompt", _TOKENS)
        self._answer_length = histogram("completion_length_tokens", "Tokens per answer", _TOKENS)
        self._queue_depth = gauge("queue_depth", "Requests waiting for a worker")
        self._workers = gauge("workers", "Workers by state", "state")
        self._busy = gauge("worker_busy_seconds_total", "Time spent generating", "worker")
        self._kv_cache = gauge(
            "kv_cache_bytes", "Keys and values of answers and remembered prompts", "worker"
        )
        self._memory = {
            kind: gauge(f"gpu_memory_{kind}_bytes", f"GPU memory: {text}", "device")
            for kind, text in (
                ("allocated", "in tensors"), ("reserved", "held by this process"), ("total", "of the device"),
            )
        }  # fmt: skip
        self._sessions = gauge("sessions", "Conversations kept")
        self._build = gauge("build_info", "Always 1", "version", "model", "source", "step", "dtype", "device")

    def observe(self, job: Job, endpoint: str) -> None:
        """Count a job that ended, in whatever way."""
        times = job.timings
        self._prompt.labels(endpoint).inc(job.prompt_tokens)
        self._completion.labels(endpoint).inc(job.completion_tokens)
        for prompt in job.prompts:
            self._prompt_length.observe(len(prompt))
        for choice in job.choices:
            self._generations.labels(endpoint, choice.finish_reason or "failed").inc()
            self._answer_length.observe(choice.num_tokens)
            self._count_tools(choice.decoder.parts)
        if times.started is not None:
            self._queue_wait.observe(times.started - times.submitted)
            if times.ended is not None:
                self._generation.observe(times.ended - times.started)
        if times.first_token is not None:
            self._first.observe(times.first_token - times.submitted)
            rate = job.speed()["tokens_per_second"]
            if rate:
                self._per_token.observe(1 / rate)

    def render(self, num_sessions: int) -> bytes:
        """The page of GET /metrics."""
        self._sessions.set(num_sessions)
        self._queue_depth.set(len(self._pool.queue))
        states = [worker.state for worker in self._pool.workers]
        for state in ("idle", "busy", "loading", "failed"):
            self._workers.labels(state).set(states.count(state))
        for worker in self._pool.workers:
            self._busy.labels(str(worker.index)).set(worker.busy_s)
            if worker.loaded is not None:
                info = worker.loaded.info
                facts = (info.name, info.source, str(info.step), info.dtype, info.device)
                self._build.labels(server_version(), *facts).set(1)
                self._kv_cache.labels(str(worker.index)).set(worker.memory["kv_cache"] or 0)
                for kind, metric in self._memory.items():
                    if (value := worker.memory[kind]) is not None:
                        metric.labels(info.device).set(value)
        return generate_latest(self.registry)

    def _count_tools(self, parts: list[dict[str, str]]) -> None:
        kinds = [*(part["type"] for part in parts), ""]
        for kind, next_kind in pairwise(kinds):
            if kind == CALL:
                outcome = "ok" if next_kind == OUTPUT else "rejected"
                self.tool_calls.labels("python", outcome).inc()
