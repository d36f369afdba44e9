"""POST /chat/completions: a whole conversation in, server-sent events out, as upstream's page speaks it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from nanochat.answer_parts import CALL, TEXT
from nanochat.serve.errors import ApiError, AsciiJSON
from nanochat.serve.jobs import Failed, Job, Piece, Scored
from nanochat.serve.schemas import Body, CompletionRequest, check_messages, check_sampling, stop_strings
from nanochat.serve.security import owner_of
from nanochat.serve.service import Service

router = APIRouter()
MAX_TOKENS = 1 << 15  # of one call to /detokenize
# an answer comes as JSON or, streamed, as server-sent events
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {"schema": {"type": "string"}}}}
}


def service_of(request: Request) -> Service:
    """The application's state."""
    return request.app.state.service


ServiceOf = Annotated[Service, Depends(service_of)]
Owner = Annotated[str, Depends(owner_of)]


@router.post("/chat/completions", responses=EVENTS)
async def chat_completions(body: CompletionRequest, request: Request, service: ServiceOf) -> Response:
    """Answer a conversation as server-sent events, or as one object with `"stream": false`."""
    check_messages(body.messages, service.settings.limits)
    check_sampling(body, service.settings.limits)
    messages = [message.model_dump() for message in body.messages]
    prompt = service.prompt(messages, body.system, body.max_tokens, continue_final=_continues(body))
    params = service.params(
        body, prompt.max_tokens, logprobs=body.logprobs,
        min_p=body.min_p or 0.0, repetition_penalty=body.repetition_penalty or 1.0,
        extend_context=prompt.extended,
    )  # fmt: skip
    stop = stop_strings(body.stop)
    job = service.submit([prompt.tokens], [params], stop, body.raw_special_tokens, prompt.notes)
    if body.stream:
        lines = _lines(service, job, body.events == "full")
        return await service.stream(job, lines)
    await service.finish(job, request, "/chat/completions")
    return AsciiJSON({**answer_body(job), "gpu": job.worker})


def _continues(body: CompletionRequest) -> bool:
    if body.continue_final_message and body.messages[-1].role != "assistant":
        text = "continue_final_message needs a last message from the assistant"
        raise ApiError(400, "invalid_role", text, param="continue_final_message")
    return body.continue_final_message


async def _lines(service: Service, job: Job, full: bool) -> AsyncGenerator[str, None]:
    if full:
        yield event(
            start=True, id=job.id, model=service.replica.info.name, gpu=job.worker,
            prompt_tokens=job.prompt_tokens, **{"truncated_messages": 0, **job.notes},
        )  # fmt: skip
    async with aclosing(service.events(job, "/chat/completions")) as items:
        async for item in items:
            if item is None:
                yield ": keep-alive\n\n"
            elif isinstance(item, Failed):
                yield event(error={"message": item.message, "code": item.code})
            elif isinstance(item, Piece):
                for line in _piece_lines(service, job, item, full):
                    yield line
    yield event(done=True, **(job_facts(job) if full else {}))


def _piece_lines(service: Service, job: Job, item: Piece, full: bool) -> list[str]:
    scores = scores_of(service, item)
    if item.delta.kind == TEXT:
        return [event(token=item.delta.text, gpu=job.worker, **scores)] if item.delta.text or scores else []
    return [event(tool=phase(item.delta.kind), text=item.delta.text, **scores)] if full else []


class Text(Body):
    """What to encode."""

    text: str


class Tokens(BaseModel):
    """What to decode."""

    tokens: Annotated[list[int], Field(max_length=MAX_TOKENS)]


@router.post("/tokenize")
async def tokenize(body: Text, service: ServiceOf) -> dict:
    """The token ids of a text, as ordinary text: without markers, and special tokens spelled out are none."""
    if len(body.text) > service.settings.limits.max_total_chars:
        text = f"the text is longer than {service.settings.limits.max_total_chars} characters"
        raise ApiError(400, "message_too_long", text, param="text")
    tokens = service.replica.tokenizer.encode(body.text)
    return {"tokens": tokens, "count": len(tokens)}


@router.post("/detokenize")
async def detokenize(body: Tokens, service: ServiceOf) -> dict:
    """The text of token ids."""
    tokenizer = service.replica.tokenizer
    wrong = next((token for token in body.tokens if not 0 <= token < tokenizer.get_vocab_size()), None)
    if wrong is not None:
        text = f"token {wrong} is not in [0, {tokenizer.get_vocab_size()})"
        raise ApiError(400, "invalid_value", text, param="tokens")
    return {"text": tokenizer.decode(body.tokens)}


def phase(kind: str) -> str:
    """How clients call a part kind that is not text."""
    return "call" if kind == CALL else "output"


def event(**fields: object) -> str:
    """One server-sent event. Non-ASCII characters stay readable, as upstream sends them."""
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"


def scores_of(service: Service, piece: Piece) -> dict[str, list[dict]]:
    """The field of an event that tells how likely its tokens were, if that was asked for."""
    return {"logprobs": [score_body(service, score) for score in piece.scores]} if piece.scores else {}


def score_body(service: Service, score: Scored) -> dict:
    """A token and what else was considered, as text, raw bytes and natural-log probability."""

    def one(token: int, logprob: float) -> dict:
        raw = service.replica.tokenizer.decode_single_token_bytes(token)
        return {
            "token": raw.decode("utf-8", "replace"),
            "logprob": round(max(logprob, -9999.0), 5),
            "bytes": list(raw),
        }

    top = [one(alternative.token, alternative.logprob) for alternative in score.top]
    return {**one(score.token, score.logprob), "top_logprobs": top}


def answer_body(job: Job) -> dict:
    """The text of a finished answer and the facts about it."""
    return {"response": job.choices[0].decoder.response, **job_facts(job)}


def job_facts(job: Job) -> dict:
    """Why an answer ended, what it cost, and its structure."""
    choice = job.choices[0]
    return {
        "finish_reason": choice.finish_reason or "error",
        "usage": job.usage(),
        "timings": job.speed(),
        "parts": choice.decoder.parts,
        **job.notes,
    }
