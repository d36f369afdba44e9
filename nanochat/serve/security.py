"""What happens to every request before and after its endpoint: keys, limits, ids, headers, counting, the log."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Sequence

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.serve.errors import ApiError, error_response
from nanochat.serve.logs import job_line, log_facts
from nanochat.serve.service import JOB, Service
from nanochat.serve.settings import Settings

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN_PATHS = ("/", "/health", "/ready", "/config", "/logo.svg", "/favicon.ico")
_QUIET_PATHS = ("/health", "/ready", "/metrics")  # what machines ask every few seconds
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self'; connect-src 'self' ws: wss:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Gate:
    """ASGI middleware of the whole application. Plain ASGI, so that disconnects reach the endpoints."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._settings, self._metrics = service.settings, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        begun, status = time.monotonic(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["X-Request-ID"] = request_id
                for name, value in _HEADERS.items():
                    out.setdefault(name, value)
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._guarded(scope, headers)(scope, _Limited(receive, self._settings), send_with_headers)
        finally:
            self._metrics.in_flight.dec()
            self._account(scope, request_id, status, time.monotonic() - begun)

    def _account(self, scope: Scope, request_id: str, status: int, total_s: float) -> None:
        # the template, not the path: a client must not invent labels, nor write into the log
        path, method = getattr(scope.get("route"), "path", "other"), scope["method"]
        self._metrics.requests.labels(method, path, str(status)).inc()
        self._metrics.duration.labels(method, path).observe(total_s)
        is_quiet = path in _QUIET_PATHS or scope["path"].startswith("/static/")
        log_facts(
            logging.DEBUG if is_quiet else logging.INFO,
            "request",
            {
                "id": request_id,
                "method": method,
                "path": path,
                "status": status,
                "remote": (scope.get("client") or (None,))[0],
                "total_ms": round(1000 * total_s, 1),
                **(job_line(scope[JOB]) if JOB in scope else {}),
            },
        )

    def _guarded(self, scope: Scope, headers: Headers) -> ASGIApp:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            self._check(scope, path, headers)
        except ApiError as error:
            return error_response(path, error)
        return self._app

    def _check(self, scope: Scope, path: str, headers: Headers) -> None:
        """Raise ApiError 413, 401 or 429 for a request that must not reach its endpoint."""
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._settings.limits.max_body_bytes:
            raise _too_large(self._settings)
        is_open = path in _OPEN_PATHS or path.startswith("/static/") or scope["method"] == "OPTIONS"
        token = bearer(headers.get("authorization"))
        if not is_open and not has_key(self._settings.api_keys, token):
            code = "invalid_api_key" if path.startswith("/v1") else "unauthorized"
            raise ApiError(401, code, "a valid API key is required")
        if scope["method"] == "POST":  # all that makes the model work, and little else
            self._service.spend(client_name(self._settings, scope.get("client"), token))


class _Limited:
    """A receive channel that refuses a body which grows beyond the limit."""

    def __init__(self, receive: Receive, settings: Settings) -> None:
        self._receive, self._settings, self._num_bytes = receive, settings, 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._settings.limits.max_body_bytes:
            raise _too_large(self._settings)
        return message


def bearer(authorization: str | None) -> str:
    """The token of an Authorization header, or an empty string."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def has_key(api_keys: Sequence[str], token: str) -> bool:
    """Whether a token opens the server; every token does when there are no keys."""
    given = token.encode("utf-8", "replace")
    return not api_keys or any(hmac.compare_digest(key.encode(), given) for key in api_keys)


def owner_of(request: Request) -> str:
    """Whose sessions a request may see: those of its key, without storing the key."""
    return owner_name(bearer(request.headers.get("authorization")))


def owner_name(token: str) -> str:
    """The owner that stands for a key."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()[:16]


def client_name(settings: Settings, address: tuple[str, int] | None, token: str) -> str:
    """Whose permissions a request uses up: those of its key, or of its address where there are no keys."""
    return f"key {owner_name(token)}" if settings.api_keys else f"address {address[0] if address else ''}"


def _too_large(settings: Settings) -> ApiError:
    return ApiError(
        413, "request_too_large", f"the body is larger than {settings.limits.max_body_bytes} bytes"
    )
