"""What all endpoints share: from a checked request to a job, from a job to an answer or a stream of it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from nanochat.sampling_params import SamplingParams
from nanochat.serve.errors import ApiError
from nanochat.serve.jobs import Ended, Failed, Item, Job, Piece, Scored, failure, new_choice
from nanochat.serve.metrics import Metrics
from nanochat.serve.pool import WorkerPool
from nanochat.serve.prompt import Message, Prompt, build_prompt
from nanochat.serve.protocol import Loaded
from nanochat.serve.rate_limit import RateLimiter
from nanochat.serve.schemas import Sampling, stop_strings
from nanochat.serve.sessions import SessionStore
from nanochat.serve.settings import Settings

logger = logging.getLogger("nanochat.serve")
JOB = "nanochat.job"  # where the scope of an HTTP request keeps its job, for the log
KEEP_ALIVE_S = 15.0  # proxies cut connections that stay silent for about a minute
# Of all streams together: each costs the server and its client a wake-up, which many streams share out among tokens.
WRITES_PER_S = 2000
_SHORTEST_PAUSE_S = 0.005


class Service:
    """The state of one application."""

    def __init__(self, settings: Settings, pool: WorkerPool) -> None:
        self.settings, self.pool = settings, pool
        self.metrics = Metrics(pool)
        self.sessions = SessionStore(settings.session_db, settings.session_ttl, settings.max_sessions)
        self._limiter = RateLimiter(settings.rate_limit) if settings.rate_limit else None

    def spend(self, client: str) -> None:
        """Count a request against the rate limit of a client; raises ApiError 429."""
        try:
            if self._limiter is not None:
                self._limiter.spend(client)
        except ApiError:
            self.metrics.rejections.labels("rate_limit").inc()
            raise

    @property
    def replica(self) -> Loaded:
        return self.pool.replica

    @property
    def too_slow(self) -> str:
        return f"the answer took longer than {self.settings.request_timeout:g} s"

    def check_ready(self) -> None:
        """503 while the model was not there yet, or when it is gone for good."""
        self.pool.check_alive()
        _ = self.pool.replica

    def prompt(
        self,
        messages: Sequence[Message],
        system: str | None,
        max_tokens: int | None,
        *,
        policy: str | None = None,
        continue_final: bool = False,
    ) -> Prompt:
        """Tokens of a conversation; counts conversations that had to be shortened."""
        self.check_ready()
        prompt = build_prompt(
            self.replica.tokenizer,
            messages,
            system=self.settings.system_prompt if system is None else system,
            max_tokens=max_tokens or self.settings.defaults.max_tokens,
            context_length=self.replica.info.context_length,
            policy=policy or self.settings.context_policy,
            continue_final=continue_final,
        )
        if prompt.truncated_messages:
            self.metrics.truncations.inc()
        return prompt

    def params(self, sampling: Sampling, max_tokens: int, **extra) -> SamplingParams:
        """Engine parameters: the request's, else the server's defaults, else a fresh seed. 400 for impossible ones."""
        defaults = self.settings.defaults
        top_k = defaults.top_k if sampling.top_k is None else sampling.top_k
        top_p = defaults.top_p if sampling.top_p is None else sampling.top_p
        seed = secrets.randbelow(2**31) if sampling.seed is None else sampling.seed
        try:
            return SamplingParams(
                temperature=defaults.temperature if sampling.temperature is None else sampling.temperature,
                top_k=top_k or None,
                top_p=max(top_p, 1e-6),  # clients may ask for 0, which means the most likely token
                max_tokens=max_tokens,
                seed=seed,
                **extra,
            )
        except ValueError as error:
            raise ApiError(400, "invalid_value", str(error)) from None

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        stop: Sequence[str],
        raw: bool = False,
        notes: dict[str, object] | None = None,
    ) -> Job:
        """Queue one job with a choice per parameter set; raises ApiError 429 or 503."""
        tokenizer = self.replica.tokenizer
        choices = [new_choice(tokenizer, replace(one, stop=stop), stop, raw) for one in params]
        job = Job(prompts, choices, self.settings.request_timeout, notes)
        try:
            self.pool.submit(job)
        except ApiError as error:
            self.metrics.rejections.labels(error.code.removeprefix("queue_")).inc()
            raise
        return job

    def submit_chat(
        self, messages: Sequence[Message], sampling: Sampling, system: str | None, logprobs: int | None = None
    ) -> Job:
        """A job for the next answer of a conversation, with the server's context policy."""
        prompt = self.prompt(messages, system, sampling.max_tokens)
        params = self.params(sampling, prompt.max_tokens, logprobs=logprobs, extend_context=prompt.extended)
        return self.submit([prompt.tokens], [params], stop_strings(sampling.stop), notes=prompt.notes)

    async def events(self, job: Job, endpoint: str) -> AsyncGenerator[Item | None, None]:
        """The job's items; None stands for a long silence. Whoever stops reading cancels the job."""
        complete = False
        try:
            async for item in job.items(KEEP_ALIVE_S):
                yield item
            complete = True
        finally:
            self.pool.cancel(job)
            self._record(job, endpoint, complete)

    async def finish(self, job: Job, request: Request, endpoint: str) -> dict[int, list[Scored]]:
        """Wait for the end of a job that is answered in one piece; returns the scored tokens of each choice.

        Raises ApiError if the job failed. A client that leaves cancels it.
        """
        request.scope[JOB] = job
        scores: dict[int, list[Scored]] = {}
        watcher = asyncio.create_task(self._cancel_on_disconnect(job, request))
        try:
            async with aclosing(self.events(job, endpoint)) as items:
                async for item in items:
                    if isinstance(item, Failed):
                        raise failure(item)
                    if isinstance(item, Ended) and item.reason == "timeout":
                        raise ApiError(504, "request_timeout", self.too_slow)
                    if isinstance(item, Piece) and item.scores:
                        scores.setdefault(item.choice, []).extend(item.scores)
            return scores
        finally:
            watcher.cancel()

    async def stream(self, job: Job, lines: AsyncGenerator[str, None]) -> StreamingResponse:
        """A response of server-sent events, begun when the job leaves the queue, so that refusals are honest."""
        try:
            await job.wait_started(KEEP_ALIVE_S)
        except BaseException:
            self.pool.cancel(job)
            raise
        return EventStream(job, lines, self.pool)

    async def _cancel_on_disconnect(self, job: Job, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.pool.cancel(job)

    def _record(self, job: Job, endpoint: str, complete: bool) -> None:
        self.metrics.observe(job, endpoint)
        reasons = ",".join(choice.finish_reason or "failed" for choice in job.choices)
        if not complete or "cancelled" in reasons:
            self.metrics.disconnects.labels(endpoint).inc()
        if self.settings.log_conversations:
            tokenizer = self.replica.tokenizer
            for prompt in job.prompts:
                logger.info("%s\n%s", "=" * 20, tokenizer.decode(prompt))
            for choice in job.choices:
                logger.info("[ASSISTANT] (worker %d): %s\n%s", job.worker, choice.decoder.response, "=" * 20)


class EventStream(StreamingResponse):
    """Server-sent events that own their job: however the response ends, the job ends too."""

    def __init__(self, job: Job, lines: AsyncGenerator[str, None], pool: WorkerPool) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_together(lines, job, pool), media_type="text/event-stream", headers=headers)
        self._job, self._pool = job, pool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[JOB] = self._job
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._pool.cancel(self._job)


async def _together(
    lines: AsyncGenerator[str, None], job: Job, pool: WorkerPool
) -> AsyncGenerator[str, None]:
    """Events that are there at the same time as one piece; with many streams, those of the next few milliseconds."""
    held = []
    async with aclosing(lines):
        async for line in lines:
            held.append(line)
            if not job.has_items:
                yield "".join(held)
                held.clear()
                pause = pool.num_running / WRITES_PER_S
                if pause > _SHORTEST_PAUSE_S:
                    await asyncio.sleep(pause)
    if held:
        yield "".join(held)
