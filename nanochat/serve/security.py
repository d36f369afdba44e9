"""What happens to every request before and after its endpoint: keys, size limit, ids, headers, counting."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Sequence

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.serve.errors import ApiError, error_response
from nanochat.serve.metrics import Metrics
from nanochat.serve.settings import Settings

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN_PATHS = ("/", "/health", "/ready", "/config", "/logo.svg", "/favicon.ico")
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self'; connect-src 'self' ws: wss:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Gate:
    """ASGI middleware of the whole application. Plain ASGI, so that disconnects reach the endpoints."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

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
            await self._guarded(headers)(scope, _Limited(receive, self._settings), send_with_headers)
        finally:
            self._metrics.in_flight.dec()
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(scope["method"], path, str(status)).inc()
            self._metrics.duration.labels(scope["method"], path).observe(time.monotonic() - begun)

    def _guarded(self, headers: Headers) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            error = self._refusal(scope["method"], path, headers)
            await (self._app if error is None else error_response(path, error))(scope, receive, send)

        return app

    def _refusal(self, method: str, path: str, headers: Headers) -> ApiError | None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._settings.limits.max_body_bytes:
            return _too_large(self._settings)
        is_open = path in _OPEN_PATHS or path.startswith("/static/") or method == "OPTIONS"
        if is_open or has_key(self._settings.api_keys, bearer(headers.get("authorization"))):
            return None
        return ApiError(
            401,
            "invalid_api_key" if path.startswith("/v1") else "unauthorized",
            "a valid API key is required",
        )


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


def _too_large(settings: Settings) -> ApiError:
    return ApiError(
        413, "request_too_large", f"the body is larger than {settings.limits.max_body_bytes} bytes"
    )
