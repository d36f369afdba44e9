"""POST /chat and /sessions: conversations that the server keeps."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, Field

from nanochat.serve.errors import ApiError, AsciiJSON
from nanochat.serve.native_api import Owner, ServiceOf, answer_body
from nanochat.serve.schemas import (
    Body,
    ChatRequest,
    Message,
    Sampling,
    check_messages,
    check_sampling,
    stop_strings,
)
from nanochat.serve.service import Service
from nanochat.serve.sessions import Session

router = APIRouter()
# a conversation comes in one of three formats
EXPORTS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"application/json": {}}
        | {kind: {"schema": {"type": "string"}} for kind in ("text/plain", "text/markdown")}
    }
}


@router.post("/chat")
async def chat(body: ChatRequest, request: Request, service: ServiceOf, owner: Owner) -> Response:
    """Answer one message; the session remembers the ones before."""
    check_sampling(body, service.settings.limits)
    check_messages([Message(role="user", content=body.message)], service.settings.limits)
    session = open_session(service, body, owner)
    with nullcontext() if body.stateless else service.sessions.in_use(session.id):
        if body.reset:
            session.messages = []
        return await _answer_session(service, session, body.message, body, request, keep=not body.stateless)


def open_session(service: Service, body: ChatRequest, owner: str) -> Session:
    """The session of a request: its own, a new one, or a passing one when it is stateless."""
    if body.stateless:
        return Session("", owner, system=body.system)
    if body.session_id is None:
        return service.sessions.create(owner, system=body.system)
    session = service.sessions.get(body.session_id, owner)
    session.system = body.system if body.system is not None else session.system
    return session


async def _answer_session(
    service: Service, session: Session, message: str, sampling: Sampling, request: Request, keep: bool
) -> Response:
    messages = [*session.messages, {"role": "user", "content": message}]
    job = service.submit_chat(messages, with_defaults(sampling, session.params), session.system)
    await service.finish(job, request, "/chat")
    if keep:
        parts = job.choices[0].decoder.parts
        session.messages = [*messages, {"role": "assistant", "content": parts}]
        service.sessions.save(session)
    name = service.replica.info.name
    return AsciiJSON({**answer_body(job), "session_id": session.id or None, "model": name})


def with_defaults(sampling: Sampling, params: dict) -> Sampling:
    """Sampling settings of a request, completed by those of its session."""
    given = {name: value for name in Sampling.model_fields if (value := getattr(sampling, name)) is not None}
    return Sampling(**{**params, **given})


# --- sessions -----------------------------------------------------------------------------------------


class SessionFields(Body):
    """What a client may set on a session."""

    title: Annotated[str, Field(max_length=200)] | None = None
    system: Annotated[str, Field(max_length=8000)] | None = None
    params: Sampling | None = None


class Truncation(BaseModel):
    """Keep the first `index` messages."""

    index: Annotated[int, Field(ge=0)]


@router.post("/sessions", status_code=201)
async def create_session(body: SessionFields, service: ServiceOf, owner: Owner) -> dict:
    """A new session."""
    params = _params(service, body)
    return service.sessions.create(owner, body.title or "", body.system, params).public()


@router.get("/sessions")
async def list_sessions(
    service: ServiceOf,
    owner: Owner,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: float | None = None,
) -> dict:
    """Summaries, most recently used first."""
    return {"sessions": service.sessions.list(owner, limit, before)}


@router.get("/sessions/{session_id}")
async def get_session(session_id: str, service: ServiceOf, owner: Owner) -> dict:
    """A session with its messages."""
    return service.sessions.get(session_id, owner).public()


@router.patch("/sessions/{session_id}")
async def change_session(session_id: str, body: SessionFields, service: ServiceOf, owner: Owner) -> dict:
    """Change title, system text or sampling."""
    session = service.sessions.get(session_id, owner)
    session.title = session.title if body.title is None else body.title
    session.system = session.system if body.system is None else body.system
    session.params |= _params(service, body)
    service.sessions.save(session)
    return session.public()


@router.delete("/sessions/{session_id}", status_code=204)
async def delete_session(session_id: str, service: ServiceOf, owner: Owner) -> None:
    """Forget a session."""
    service.sessions.delete(session_id, owner)


@router.post("/sessions/{session_id}/truncate")
async def truncate_session(session_id: str, body: Truncation, service: ServiceOf, owner: Owner) -> dict:
    """Drop the end of a conversation, to edit or regenerate it."""
    session = service.sessions.get(session_id, owner)
    with service.sessions.in_use(session_id):
        session.messages = session.messages[: body.index]
        service.sessions.save(session)
    return session.public()


@router.post("/sessions/{session_id}/regenerate")
async def regenerate(
    session_id: str, request: Request, service: ServiceOf, owner: Owner, body: Sampling | None = None
) -> Response:
    """Replace the last answer."""
    session = service.sessions.get(session_id, owner)
    sampling = body or Sampling()
    check_sampling(sampling, service.settings.limits)
    asked = [index for index, message in enumerate(session.messages) if message["role"] == "user"]
    if not asked:
        raise ApiError(400, "no_messages", "this session has no message to answer")
    message = session.messages[asked[-1]]["content"]
    with service.sessions.in_use(session_id):
        session.messages = session.messages[: asked[-1]]
        return await _answer_session(service, session, message, sampling, request, keep=True)


@router.get("/sessions/{session_id}/export", responses=EXPORTS)
async def export_session(
    session_id: str,
    service: ServiceOf,
    owner: Owner,
    format: Literal["json", "jsonl", "markdown"] = "json",
) -> Response:
    """The conversation as a file; jsonl is a line of training data for the custom conversation task."""
    session = service.sessions.get(session_id, owner)
    if format == "json":
        return AsciiJSON(session.public())
    if format == "jsonl":
        return PlainTextResponse(json.dumps(session.messages, ensure_ascii=False) + "\n")
    return PlainTextResponse(_markdown(session), media_type="text/markdown; charset=utf-8")


def _params(service: Service, body: SessionFields) -> dict:
    if body.params is None:
        return {}
    check_sampling(body.params, service.settings.limits)
    stop_strings(body.params.stop)
    return body.params.model_dump(exclude_none=True)


def _markdown(session: Session) -> str:
    lines = [f"# {session.title or 'Conversation'}", ""]
    for message in session.messages:
        content = message["content"]
        text = content if isinstance(content, str) else "".join(map(_part_markdown, content))
        lines += [f"**{message['role'].capitalize()}**", "", text, ""]
    return "\n".join(lines)


def _part_markdown(part: dict[str, str]) -> str:
    if part["type"] == "text":
        return part["text"]
    return f"`{part['text']}`" if part["type"] == "python" else f" = `{part['text']}`"
