"""What the OpenAI-compatible endpoints share: names of the model, sampling, and answers as one body or a stream."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

from fastapi import Request
from fastapi.responses import Response

from nanochat.answer_parts import TEXT
from nanochat.sampling_params import SamplingParams
from nanochat.serve.errors import ApiError, AsciiJSON, openai_error
from nanochat.serve.jobs import Choice, Ended, Failed, Job, Piece, Scored
from nanochat.serve.openai_schemas import OpenAISampling
from nanochat.serve.schemas import Sampling
from nanochat.serve.service import Service


def model_names(service: Service) -> tuple[str, ...]:
    """The names under which the model is served."""
    return service.settings.served_model_names or (service.replica.info.name,)


def checked_name(service: Service, name: str) -> str:
    """The name itself; 404 for one that is not served."""
    if name == "default" or name in model_names(service):
        return name
    text = f"the model {name[:80]!r} does not exist here; served: {', '.join(model_names(service))}"
    raise ApiError(404, "model_not_found", text, param="model")


def sampling_params(
    service: Service, body: OpenAISampling, max_tokens: int, logprobs: int | None, num_prompts: int = 1
) -> list[SamplingParams]:
    """Engine parameters of each choice: `n` per prompt, each of them with a seed of its own."""
    sampling = Sampling(temperature=body.temperature, top_k=body.top_k, top_p=body.top_p)
    extra: dict[str, Any] = {
        "logprobs": logprobs,
        "min_p": body.min_p or 0.0,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "repetition_penalty": body.repetition_penalty or 1.0,
        "logit_bias": body.logit_bias or {},
    }
    return [
        service.params(sampling.model_copy(update={"seed": seed}), max_tokens, **extra)
        for seed in [_seed(body, index) for index in range(body.num_choices)] * num_prompts
    ]


def _seed(body: OpenAISampling, index: int) -> int | None:
    return None if body.seed is None else (body.seed + index) % 2**63


class Reply(ABC):
    """The answer to one request in the words of the API; the two kinds of completions differ in the choices."""

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    id_prefix: ClassVar[str]
    endpoint: ClassVar[str]

    def __init__(self, service: Service, job: Job, body: OpenAISampling) -> None:
        self.service, self.job, self.body = service, job, body
        self._head = {
            "id": f"{self.id_prefix}-{job.id}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": fingerprint(service),
        }

    @abstractmethod
    def choice(self, index: int, choice: Choice, scores: Sequence[Scored]) -> dict:
        """A choice of an answer in one piece, without index and finish_reason."""

    @abstractmethod
    def opening(self, index: int) -> dict | None:
        """The first content of a streamed choice, before anything is generated."""

    @abstractmethod
    def content(self, index: int, text: str, scores: Sequence[Scored]) -> dict:
        """New content of a streamed choice; the last has neither text nor scores."""

    async def respond(self, request: Request) -> Response:
        """The response, streamed or in one piece. Raises ApiError."""
        if self.body.stream:
            return await self.service.stream(self.job, self._chunks())
        scores = await self.service.finish(self.job, request, self.endpoint)
        choices = [
            {
                "index": index,
                **self.choice(index, choice, scores.get(index, [])),
                "finish_reason": _reason(choice),
            }
            for index, choice in enumerate(self.job.choices)
        ]
        return AsciiJSON({**self._head, "object": self.kind, "choices": choices, "usage": usage(self.job)})

    async def _chunks(self) -> AsyncGenerator[str, None]:
        for index in range(len(self.job.choices)):
            opening = self.opening(index)
            if opening is not None:
                yield self._chunk(index, opening)
        async with aclosing(self.service.events(self.job, self.endpoint)) as items:
            async for item in items:
                if item is None:
                    yield ": keep-alive\n\n"
                elif isinstance(item, Failed):
                    yield _line(openai_error(item.status, item.message, item.code))
                    return
                elif isinstance(item, Ended) and item.reason == "timeout":
                    yield _line(openai_error(504, self.service.too_slow, "request_timeout"))
                    return
                elif isinstance(item, Ended):
                    reason = _reason(self.job.choices[item.choice])
                    yield self._chunk(item.choice, self.content(item.choice, "", ()), reason)
                elif isinstance(item, Piece) and (item.delta.kind == TEXT or item.scores):
                    text = item.delta.text if item.delta.kind == TEXT else ""
                    yield self._chunk(item.choice, self.content(item.choice, text, item.scores))
        if self.body.include_usage:
            yield _line({**self._head, "object": self.chunk_kind, "choices": [], "usage": usage(self.job)})
        yield "data: [DONE]\n\n"

    def _chunk(self, index: int, content: dict, reason: str | None = None) -> str:
        choice = {"index": index, **content, "finish_reason": reason}
        extra = {"usage": None} if self.body.include_usage else {}
        return _line({**self._head, "object": self.chunk_kind, "choices": [choice], **extra})


def usage(job: Job) -> dict:
    """Token counts with the details that clients expect."""
    return {
        **job.usage(),
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def fingerprint(service: Service) -> str:
    """Changes whenever the same seed may give another answer."""
    info = service.replica.info
    identity = f"{info.source} {info.tag} {info.step} {info.created} {info.dtype} {info.device}"
    return f"fp_{hashlib.sha256(identity.encode()).hexdigest()[:10]}"


def _reason(choice: Choice) -> str:
    return "length" if choice.finish_reason == "length" else "stop"


def _line(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
