"""WS /ws: a conversation over one socket, with frames for questions, answers and control."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import aclosing, suppress
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import ValidationError

from nanochat.answer_parts import TEXT
from nanochat.serve.errors import ApiError
from nanochat.serve.jobs import Ended, Failed, Job, Piece, Started
from nanochat.serve.logs import job_line, log_facts
from nanochat.serve.native_api import answer_body, phase, scores_of
from nanochat.serve.schemas import CompletionRequest, Message, Sampling, check_messages, check_sampling
from nanochat.serve.security import bearer, client_name, has_key, owner_name
from nanochat.serve.service import Service
from nanochat.serve.sessions import Session

router = APIRouter()
AUTH_S = 10.0


@router.websocket("/ws")
async def ws(socket: WebSocket) -> None:
    """Serve one connection until either side closes it."""
    service: Service = socket.app.state.service
    if not _same_site(socket, service):
        await socket.close(1008, "origin not allowed")
        return
    await socket.accept()
    service.metrics.websockets.inc()
    try:
        token = await _token(socket, service)
        if token is None:
            await socket.close(1008, "unauthorized")
            return
        await _Connection(socket, service, token).run()
    except WebSocketDisconnect:
        pass  # the client went away between two frames; its job was cancelled on the way here
    finally:
        service.metrics.websockets.dec()


def _same_site(socket: WebSocket, service: Service) -> bool:
    """Browsers let any page open a socket to any server and only say where it came from."""
    origin = socket.headers.get("origin")
    allowed = service.settings.cors_origins
    return (
        origin is None or origin in allowed or "*" in allowed or _host(origin) == socket.headers.get("host")
    )


def _host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


async def _token(socket: WebSocket, service: Service) -> str | None:
    """The key of the client, from header, query or first frame; None if it has none that fits."""
    keys = service.settings.api_keys
    token = bearer(socket.headers.get("authorization")) or socket.query_params.get("token", "")
    if not has_key(keys, token) and not token:
        with suppress(asyncio.TimeoutError, ValueError, AttributeError):
            frame = json.loads(await asyncio.wait_for(_receive(socket), AUTH_S))
            token = str(frame.get("token", "")) if frame.get("type") == "auth" else ""
    return token if has_key(keys, token) else None


class _Connection:
    """One client, its session, its defaults, and the one answer it may have running."""

    def __init__(self, socket: WebSocket, service: Service, token: str) -> None:
        self._socket, self._service, self._owner = socket, service, owner_name(token)
        self._client = client_name(service.settings, socket.scope.get("client"), token)
        self._defaults: dict[str, Any] = {}
        self._session: Session | None = None
        self._job: Job | None = None
        self._answering: asyncio.Task[None] | None = None

    async def run(self) -> None:
        wanted = self._socket.query_params.get("session_id")
        await self._guarded(self._open(wanted))
        try:
            while True:
                await self._guarded(self._handle(_frame(await _receive(self._socket))))
        finally:
            await self._end()

    async def _open(self, session_id: str | None) -> None:
        sessions = self._service.sessions
        try:
            self._session = sessions.get(session_id, self._owner) if session_id else None
        finally:
            self._session = self._session or sessions.create(self._owner)
            settings, info = self._service.settings, self._service.pool.health()
            await self._send(
                "hello", session_id=self._session.id, model=info["model"],
                defaults={name: getattr(settings.defaults, name) for name in settings.defaults.__slots__},
                limits={name: getattr(settings.limits, name) for name in settings.limits.__slots__},
                context_length=self._service.replica.info.context_length if info["model"] else None,
            )  # fmt: skip

    async def _end(self) -> None:
        if self._answering is not None:
            self._answering.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._answering
        if self._session is not None and not self._session.messages:
            with suppress(ApiError):
                self._service.sessions.delete(self._session.id, self._owner)

    async def _guarded(self, work: Any) -> None:
        """Run the handling of one frame; a mistake in it is reported and the connection stays open."""
        try:
            await work
        except ApiError as error:
            await self._send("error", error={"message": error.message, "code": error.code})
        except ValidationError as error:
            first = error.errors()[0]
            text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            await self._send("error", error={"message": text, "code": "invalid_value"})

    async def _handle(self, frame: dict[str, Any]) -> None:
        kind = frame.get("type", "chat")
        if kind == "ping":
            await self._send("pong")
        elif kind == "stop":
            if self._job is not None:
                self._service.pool.cancel(self._job)
        elif kind == "set":
            self._set(frame)
        elif kind in ("chat", "reset", "regenerate", "edit"):
            if self._answering is not None and not self._answering.done():
                raise ApiError(409, "busy", "an answer is running; stop it first")
            self._change(kind, frame)
        elif kind != "auth":
            raise ApiError(400, "invalid_value", f"unknown frame type {str(kind)[:40]!r}")

    def _set(self, frame: dict[str, Any]) -> None:
        names = [*Sampling.model_fields, "system"]
        chosen = {name: frame[name] for name in names if name in frame}
        check_sampling(Sampling(**chosen), self._service.settings.limits)
        self._defaults |= chosen

    def _change(self, kind: str, frame: dict[str, Any]) -> None:
        assert self._session is not None
        session = self._session
        if frame.get("session_id") not in (None, session.id):
            session = self._session = self._service.sessions.get(str(frame["session_id"]), self._owner)
        messages = session.messages
        if kind == "reset":
            messages, question = [], None
        elif kind == "chat" and frame.get("messages") is not None:
            question = frame["messages"]
        elif kind == "chat":
            question = [*messages, {"role": "user", "content": frame.get("message")}]
        elif kind == "edit":
            index = frame.get("index")
            if not isinstance(index, int) or not 0 <= index < len(messages):
                raise ApiError(400, "invalid_value", "index is not that of a message")
            question = [*messages[:index], {"role": "user", "content": frame.get("message")}]
        else:
            asked = [index for index, message in enumerate(messages) if message["role"] == "user"]
            question = messages[: asked[-1] + 1] if asked else []
        if question is None:
            session.messages = []
            self._service.sessions.save(session)
            return
        self._ask(session, question, frame)

    def _ask(self, session: Session, messages: Any, frame: dict[str, Any]) -> None:
        given = {
            name: frame[name] for name in [*Sampling.model_fields, "system", "logprobs"] if name in frame
        }
        body = CompletionRequest(**{**session.params, **self._defaults, **given, "messages": messages})
        check_messages(body.messages, self._service.settings.limits)
        check_sampling(body, self._service.settings.limits)
        self._service.spend(self._client)
        system = body.system if body.system is not None else session.system
        conversation = [message.model_dump() for message in body.messages]
        self._job = self._service.submit_chat(conversation, body, system, body.logprobs)
        wanted = frame.get("id")
        identity = wanted if isinstance(wanted, str | int) else self._job.id
        keeper = None if frame.get("stateless") is True else session
        self._answering = asyncio.create_task(self._answer(keeper, body.messages, self._job, identity))

    async def _answer(
        self, session: Session | None, messages: list[Message], job: Job, identity: str | int
    ) -> None:
        if position := self._service.pool.queue.position(job):
            await self._send("queued", id=identity, position=position)
        try:
            async with aclosing(self._service.events(job, "/ws")) as items:
                async for item in items:
                    if isinstance(item, Started):
                        facts = {"gpu": item.worker, "prompt_tokens": job.prompt_tokens, **job.notes}
                        await self._send("start", id=identity, **facts)
                    elif isinstance(item, Piece) and item.delta.kind == TEXT:
                        scores = scores_of(self._service, item)
                        await self._send(
                            "token", id=identity, token=item.delta.text, gpu=job.worker, **scores
                        )
                    elif isinstance(item, Piece):
                        text, kind = item.delta.text, phase(item.delta.kind)
                        scores = scores_of(self._service, item)
                        await self._send("tool", id=identity, phase=kind, text=text, **scores)
                    elif isinstance(item, Failed):
                        error = {"message": item.message, "code": item.code}
                        await self._send("error", id=identity, error=error)
                        return
                    elif isinstance(item, Ended):
                        await self._send("done", id=identity, done=True, **answer_body(job))
        finally:
            if session is not None:
                self._store(session, messages, job)
            log_facts(logging.INFO, "answer", {"path": "/ws", **job_line(job)})

    def _store(self, session: Session, messages: list[Message], job: Job) -> None:
        """Keep the answer, also a partial one, so that a client that reconnects finds it."""
        choice = job.choices[0]
        answer: dict[str, Any] = {"role": "assistant", "content": choice.decoder.parts}
        if choice.finish_reason not in ("stop", "length"):
            answer["cancelled"] = True
        session.messages = [*(message.model_dump() for message in messages), answer]
        self._service.sessions.save(session)

    async def _send(self, kind: str, **fields: object) -> None:
        await self._socket.send_text(json.dumps({"type": kind, **fields}))


async def _receive(socket: WebSocket) -> str:
    """The text of the next frame; one of bytes is read as text."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005))
    text = message.get("text")
    return message["bytes"].decode("utf-8", "replace") if text is None else text


def _frame(text: str) -> dict[str, Any]:
    """A frame that is not a JSON object is a message by itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"type": "chat", "message": text}
