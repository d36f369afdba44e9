"""Chat with a model in the browser, and serve it to programs through an OpenAI-compatible API."""

from __future__ import annotations

import functools
import os
import re
import socket
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import UserError
from nanochat.configurator import option, run
from nanochat.options import STAGES, WhichWeights

if TYPE_CHECKING:
    from nanochat.serve.launcher import Launcher
    from nanochat.serve.pool import WorkerPool
    from nanochat.serve.settings import Settings


@dataclass(frozen=True)
class Config(WhichWeights):
    num_gpus: int = option(1, "model replicas, one per GPU; 0 uses all", short="n")
    source: str | None = option(
        None, "stage of the checkpoint; default: the last there is", short="i", choices=(*STAGES, None)
    )
    temperature: float = option(0.8, "default temperature", short="t")
    top_k: int = option(50, "default top-k; 0 switches it off", short="k")
    top_p: float = option(1.0, "default top-p")
    max_tokens: int = option(512, "default number of new tokens", short="m")
    system_prompt: str = option("", "system text of conversations that bring none")
    system_prompt_file: str = option("", "a file with that text")
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "TCP port", short="p")
    dtype: str | None = option(
        None, "compute dtype; None chooses", short="d", choices=("bfloat16", "float16", "float32")
    )
    served_model_name: str = option("", "names in /v1/models, separated by commas")
    api_key: str = option("", "keys that clients must send, separated by commas (or NANOCHAT_API_KEYS)")
    cors_origin: str = option(
        "",
        "origins whose pages may call the API, such as https://example.com, separated by commas; * for all",
    )
    max_batch: int = option(32, "answers that one replica generates at the same time")
    max_queue: int = option(64, "requests that may wait, 0 for none; more are refused with 429", least=0)
    rate_limit: str = option("", "requests per key or address, such as 30/minute; more are refused with 429")
    queue_timeout: float = option(
        60.0, "seconds a request may wait; 0 refuses what cannot start at once", least=0
    )
    request_timeout: float = option(300.0, "seconds an answer may take", least=1)
    context_policy: str = option(
        "truncate",
        "when a conversation is too long: drop its oldest messages, refuse, or go beyond the trained context",
        choices=("truncate", "error", "extend"),
    )  # fmt: skip
    session_db: str = option(
        "", "SQLite file for conversations kept on the server; empty keeps them in memory"
    )
    session_ttl: float = option(3600.0, "seconds after which an idle session is forgotten", least=1)
    max_sessions: int = option(1000, "sessions kept at most; the oldest gives way", least=1)
    python_tool: str = option(
        "calculator", "what <|python_start|> calls", choices=("calculator", "sandbox", "off")
    )
    reload_model_on_sighup: bool = option(False, "on SIGHUP, load the model anew: a newer checkpoint, or tag")
    root_path: str = option("", "path prefix that a reverse proxy takes off, such as /llm")
    ssl_certfile: str | None = option(None, "TLS certificate")
    ssl_keyfile: str | None = option(None, "TLS key")
    log_format: str = option("text", "lines of the log", choices=("text", "json"))
    log_conversations: bool = option(False, "log what people and the model say")
    ui: bool = option(True, "serve the page; --no-ui leaves only the API")
    metrics: bool = option(True, "serve /metrics")


def main(cfg: Config) -> None:
    """Serve a chat model: a page for people, /chat for scripts, /v1 for OpenAI clients."""
    # before the slow imports, so that a wrong flag or a taken port is known at once
    settings = settings_of(cfg)
    check_certificate(cfg)
    if cfg.session_db:
        check_session_db(cfg.session_db)
    listener = listen(cfg.host, cfg.port)
    if cfg.dtype:
        os.environ["NANOCHAT_DTYPE"] = cfg.dtype
    launcher = start_models(cfg)  # they load while the server itself is still importing
    import uvicorn

    from nanochat.serve.app import create_app
    from nanochat.serve.logs import start_logging
    from nanochat.serve.pool import WorkerPool

    warn_if_exposed(cfg, settings)
    announced: list[bool] = []

    def on_change(pool: WorkerPool) -> None:
        server.should_exit = server.should_exit or pool.failed
        if pool.ready and not announced:
            announced.append(True)
            announce(cfg, pool, listener.getsockname()[1])

    pool = WorkerPool(launcher, settings, on_change)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings, pool), log_level="warning", root_path=cfg.root_path, ws_max_size=1 << 16,
            ws_ping_interval=20, ws_ping_timeout=60, timeout_graceful_shutdown=3,
            ssl_certfile=cfg.ssl_certfile, ssl_keyfile=cfg.ssl_keyfile,
        )
    )  # fmt: skip
    start_logging(cfg.log_format)
    server.run(sockets=[listener])
    if pool.failed:
        error = pool.error
        raise error if isinstance(error, UserError) else UserError(f"the model could not be served: {error}")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; UserError if the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot listen on {host}:{port}: {reason}; choose another --port or --host"
        ) from None
    return listener


def settings_of(cfg: Config) -> Settings:
    """The server's settings; UserError for what makes no sense, or defaults that its own limits would refuse."""
    from nanochat.serve.settings import Defaults, Limits, Rate, Settings

    limits = Limits()
    check("--temperature", cfg.temperature, 0, limits.max_temperature)
    check("--top-k", cfg.top_k, 0, limits.max_top_k)
    check("--top-p", cfg.top_p, 0, 1)
    check("--max-tokens", cfg.max_tokens, 1, limits.max_tokens)
    check("--max-batch", cfg.max_batch, limits.max_choices, 4096)
    if cfg.root_path and not re.fullmatch(r"(/[^/?#\s]+)+", cfg.root_path):
        raise UserError(f"--root-path={cfg.root_path} is not a path prefix; write it like /llm")
    for origin in names(cfg.cors_origin):
        if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise UserError(f"--cors-origin={origin} is no origin; write it like https://example.com, or *")
    return Settings(
        defaults=Defaults(cfg.temperature, cfg.top_k, cfg.top_p, cfg.max_tokens),
        limits=limits,
        served_model_names=names(cfg.served_model_name),
        api_keys=names(cfg.api_key or os.environ.get("NANOCHAT_API_KEYS", "")),
        cors_origins=names(cfg.cors_origin),
        system_prompt=system_prompt(cfg),
        reload_on_sighup=cfg.reload_model_on_sighup,
        context_policy=cfg.context_policy,
        rate_limit=Rate.parse(cfg.rate_limit),
        max_queue=cfg.max_queue,
        queue_timeout=cfg.queue_timeout,
        request_timeout=cfg.request_timeout,
        session_ttl=cfg.session_ttl,
        max_sessions=cfg.max_sessions,
        session_db=cfg.session_db,
        log_conversations=cfg.log_conversations,
        ui=cfg.ui,
        metrics=cfg.metrics,
    )


def system_prompt(cfg: Config) -> str:
    """The default system text, from the flag or the file; UserError if it cannot be read."""
    if not cfg.system_prompt_file:
        return cfg.system_prompt
    if cfg.system_prompt:
        raise UserError("--system-prompt and --system-prompt-file exclude each other")
    try:
        return Path(cfg.system_prompt_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--system-prompt-file={cfg.system_prompt_file} cannot be read: {error}") from None


def names(text: str) -> tuple[str, ...]:
    """The entries of a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def check(flag: str, value: float, low: float, high: float) -> None:
    """UserError unless low <= value <= high."""
    if not low <= value <= high:
        raise UserError(f"{flag}={value} is out of range; use {low} to {high}")


def check_certificate(cfg: Config) -> None:
    """UserError for TLS files that cannot be used."""
    import ssl

    for flag, path in (("--ssl-certfile", cfg.ssl_certfile), ("--ssl-keyfile", cfg.ssl_keyfile)):
        if path and not os.path.isfile(path):
            raise UserError(f"{flag}={path} is not a file")
    if cfg.ssl_keyfile and not cfg.ssl_certfile:
        raise UserError("--ssl-keyfile needs the certificate too; name it with --ssl-certfile")
    if cfg.ssl_certfile:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cfg.ssl_certfile, cfg.ssl_keyfile)
        except OSError as error:  # SSLError is one
            raise UserError(
                f"--ssl-certfile={cfg.ssl_certfile}: no certificate with its key: {error}"
            ) from None


def check_session_db(path: str) -> None:
    """UserError for a file that SQLite cannot write to."""
    import sqlite3

    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute("begin immediate")
    except sqlite3.Error as error:
        raise UserError(
            f"--session-db={path}: {error}; name a database, or a new file in a folder that exists"
        ) from None


def start_models(cfg: Config) -> Launcher:
    """Start a process for each replica."""
    from nanochat.serve.launcher import Launcher
    from nanochat.serve.loading import load_replica

    count = cfg.num_gpus or count_gpus()
    check("--num-gpus", count, 1, 1024)
    load = functools.partial(
        load_replica, count=count, source=cfg.source, device_type=cfg.device_type, model_tag=cfg.model_tag, step=cfg.step,
        python_tool=cfg.python_tool, max_batch=cfg.max_batch, quantized=cfg.quantize,
    )  # fmt: skip
    return Launcher(load, count)


def count_gpus() -> int:
    """How many GPUs torch sees, at least 1. Asks another process: this one does without torch."""
    code = "import torch; print(torch.cuda.device_count())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return max(1, int(found))


def announce(cfg: Config, pool: WorkerPool, port: int) -> None:
    """Say what is served and where."""
    info, scheme = pool.replica.info, "https" if cfg.ssl_certfile else "http"
    host = "localhost" if cfg.host in ("127.0.0.1", "0.0.0.0", "::", "::1") else cfg.host
    model = f"{info.name}, step {info.step}, on {info.device} ({info.dtype})"
    print(f"{model}, context {info.context_length} tokens", flush=True)
    proxy = f"through the proxy below {cfg.root_path}; " if cfg.root_path else ""
    print(f"open {scheme}://{host}:{port}  ({proxy}Ctrl-C stops)", flush=True)


def warn_if_exposed(cfg: Config, settings: Settings) -> None:
    """Say loudly that a server which others can reach is open to them."""
    if cfg.host not in ("127.0.0.1", "::1", "localhost") and not settings.api_keys:
        print(
            f"warning: {cfg.host} can be reached from other machines and there is no --api-key",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(Config, main)
