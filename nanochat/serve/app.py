"""The FastAPI application: endpoints that describe the server, the page, and the parts put together."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles

from nanochat.serve import native_api, openai_api, openai_text, session_api, websocket
from nanochat.serve.errors import (
    AsciiJSON,
    NativeFailure,
    OpenAIFailure,
    documented,
    install_error_handlers,
    is_openai,
)
from nanochat.serve.metrics import CONTENT_TYPE
from nanochat.serve.pool import WorkerPool
from nanochat.serve.security import Gate
from nanochat.serve.service import Service
from nanochat.serve.settings import Settings, server_version

FAILURES = (400, 401, 404, 413, 429, 500, 503, 504)
STATIC = files("nanochat.serve") / "static"


class _App(FastAPI):
    """FastAPI that describes what is really sent."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI schema. FastAPI adds a 422 to whatever takes parameters; below /v1 that is a 400."""
        schema = super().openapi()
        for path, operations in schema["paths"].items():
            for operation in operations.values() if is_openai(path) else ():
                operation["responses"].pop("422", None)
        return schema


def create_app(settings: Settings, pool: WorkerPool) -> FastAPI:
    """The application over a pool. Its lifespan is that of the pool's processes."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        pool.start()
        if settings.reload_on_sighup:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, pool.reload)
        try:
            yield
        finally:
            await pool.close()
            service.sessions.close()

    # FastAPI's interactive pages load scripts from elsewhere; the schema itself stays at /openapi.json
    app = _App(title="nanochat", version=server_version(), lifespan=lifespan, docs_url=None, redoc_url=None)
    service = app.state.service = Service(settings, pool)
    install_error_handlers(app)
    for module in (native_api, session_api, websocket):
        app.include_router(module.router, responses=documented(NativeFailure, *FAILURES, 409, 422))
    for module in (openai_api, openai_text):
        app.include_router(module.router, responses=documented(OpenAIFailure, *FAILURES))
    _add_status(app, service)
    if settings.ui:
        _add_page(app)
    app.add_middleware(Gate, service=service)
    if settings.cors_origins:  # outermost, so that refusals too can be read by the page of another origin
        any_origin = "*" in settings.cors_origins
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_credentials=not any_origin,
            allow_methods=["*"], allow_headers=["*"],
        )  # fmt: skip
    return app


def _add_status(app: FastAPI, service: Service) -> None:
    pool = service.pool

    @app.get("/health")
    async def health() -> dict:
        return {**pool.health(), "version": app.version}

    @app.get("/ready", responses={503: {"description": "no worker has a model"}})
    async def ready() -> Response:
        return AsciiJSON({"ready": pool.ready, "status": pool.status}, 200 if pool.ready else 503)

    @app.get("/stats", responses=documented(NativeFailure, 401))
    async def stats() -> dict:
        return {**pool.stats(), "sessions": len(service.sessions)}

    @app.get("/config")
    async def config() -> dict:
        return describe(service)

    if service.settings.metrics:

        @app.get("/metrics", responses=documented(NativeFailure, 401), response_class=PlainTextResponse)
        async def metrics() -> Response:
            return Response(service.metrics.render(len(service.sessions)), media_type=CONTENT_TYPE)


def describe(service: Service) -> dict:
    """What a client has to know to offer sensible controls. Model facts are null while it loads."""
    settings, health = service.settings, service.pool.health()
    return {
        "model": health["model"],
        "source": health["source"],
        "step": health["step"],
        "defaults": asdict(settings.defaults),
        "limits": asdict(settings.limits),
        "context_length": service.replica.info.context_length if health["model"] else None,
        "system_prompt": bool(settings.system_prompt),
        "auth_required": bool(settings.api_keys),
        "features": ["sessions", "websocket", "openai", "logprobs"],
    }


def _add_page(app: FastAPI) -> None:
    page, logo = STATIC / "index.html", STATIC / "logo.svg"

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return FileResponse(str(page), media_type="text/html", headers={"Cache-Control": "no-cache"})

    @app.get("/logo.svg", include_in_schema=False)
    async def logo_svg() -> Response:
        return FileResponse(str(logo), media_type="image/svg+xml")

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon(request: Request) -> Response:
        return RedirectResponse(f"{request.scope.get('root_path', '')}/logo.svg", 308)

    app.mount("/static", StaticFiles(directory=str(STATIC)), name="static")
