"""The OpenAI-compatible endpoints: models and chat completions."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nanochat.serve.errors import ApiError, AsciiJSON, openai_error
from nanochat.serve.jobs import Choice, Ended, Failed, Job, Piece, Scored
from nanochat.serve.native_api import ServiceOf, score_body
from nanochat.serve.openai_schemas import OpenAIRequest, plain_messages, refuse_unsupported
from nanochat.serve.parts import TEXT
from nanochat.serve.schemas import Sampling, stop_strings
from nanochat.serve.service import Service

router = APIRouter(prefix="/v1")
ENDPOINT = "/v1/chat/completions"


@router.get("/models")
async def list_models(service: ServiceOf) -> dict:
    """The model under each of its names."""
    return {"object": "list", "data": [_model(service, name) for name in _names(service)]}


@router.get("/models/{model}")
async def get_model(model: str, service: ServiceOf) -> dict:
    """One model; 404 for a name that is not served."""
    return _model(service, _checked_name(service, model))


@router.post("/chat/completions")
async def chat_completions(body: OpenAIRequest, request: Request, service: ServiceOf) -> Response:
    """Answer a conversation, in one piece or as a stream of chunks."""
    _checked_name(service, body.model)
    refuse_unsupported(body)
    wanted = body.max_completion_tokens or body.max_tokens
    prompt = service.prompt(plain_messages(body.messages), None, wanted, policy="error")
    sampling = Sampling(temperature=body.temperature, top_k=body.top_k, top_p=body.top_p)
    seeds = [None if body.seed is None else (body.seed + index) % 2**63 for index in range(body.num_choices)]
    extra = {
        "logprobs": body.num_logprobs,
        "min_p": body.min_p or 0.0,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "repetition_penalty": body.repetition_penalty or 1.0,
        "logit_bias": body.logit_bias or {},
    }
    params = [
        service.params(sampling.model_copy(update={"seed": seed}), prompt.max_tokens, **extra)
        for seed in seeds
    ]
    job = service.submit(prompt.tokens, params, stop_strings(body.stop))
    reply = _Reply(service, job, body)
    if body.stream:
        return await service.stream(job, reply.chunks())
    scores = await service.finish(job, request, ENDPOINT)
    return AsciiJSON(reply.whole(scores))


class _Reply:
    """The answer to one request in the words of the API."""

    def __init__(self, service: Service, job: Job, body: OpenAIRequest) -> None:
        self._service, self._job, self._body = service, job, body
        self._head = {
            "id": f"chatcmpl-{job.id}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": fingerprint(service),
        }

    def whole(self, scores: dict[int, list[Scored]]) -> dict:
        """The body of an answer in one piece."""
        choices = [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": choice.decoder.response,
                    "refusal": None,
                    "nanochat_parts": choice.decoder.parts,
                },
                "logprobs": self._logprobs(scores.get(index, [])),
                "finish_reason": _reason(choice),
            }
            for index, choice in enumerate(self._job.choices)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage(self._job)}

    async def chunks(self) -> AsyncIterator[str]:
        """The events of a streamed answer."""
        for index in range(len(self._job.choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async with aclosing(self._service.events(self._job, ENDPOINT)) as items:
            async for item in items:
                if item is None:
                    yield ": keep-alive\n\n"
                elif isinstance(item, Failed):
                    yield _line(openai_error(item.status, item.message, item.code))
                    return
                elif isinstance(item, Ended) and item.reason == "timeout":
                    yield _line(openai_error(504, self._service.too_slow, "request_timeout"))
                    return
                elif isinstance(item, Ended):
                    yield self._chunk(item.choice, {}, reason=_reason(self._job.choices[item.choice]))
                elif isinstance(item, Piece) and (item.delta.kind == TEXT or item.scores):
                    text = item.delta.text if item.delta.kind == TEXT else ""
                    yield self._chunk(item.choice, {"content": text}, list(item.scores))
        if self._body.include_usage:
            yield _line(
                {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(self._job)}
            )
        yield "data: [DONE]\n\n"

    def _chunk(
        self, index: int, delta: dict, scores: list[Scored] | None = None, reason: str | None = None
    ) -> str:
        logprobs = self._logprobs(scores) if scores else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        extra = {"usage": None} if self._body.include_usage else {}
        return _line({**self._head, "object": "chat.completion.chunk", "choices": [choice], **extra})

    def _logprobs(self, scores: list[Scored]) -> dict | None:
        if self._body.num_logprobs is None:
            return None
        return {"content": [score_body(self._service, score) for score in scores], "refusal": None}


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


def _names(service: Service) -> tuple[str, ...]:
    return service.settings.served_model_names or (service.replica.info.name,)


def _checked_name(service: Service, name: str) -> str:
    if name == "default" or name in _names(service):
        return name
    text = f"the model {name[:80]!r} does not exist here; served: {', '.join(_names(service))}"
    raise ApiError(404, "model_not_found", text, param="model")


def _model(service: Service, name: str) -> dict:
    info = service.replica.info
    return {
        "id": name,
        "object": "model",
        "created": info.created,
        "owned_by": "nanochat",
        "context_length": info.context_length,
        "source": info.source,
        "step": info.step,
    }


def _reason(choice: Choice) -> str:
    return "length" if choice.finish_reason == "length" else "stop"


def _line(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
