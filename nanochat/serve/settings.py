"""What the server is told at start, and what it knows about the model that it serves."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from nanochat.common import UserError

if TYPE_CHECKING:  # both import torch, and flags should be checked at once
    from nanochat.engine import Engine
    from nanochat.tokenizer import RustBPETokenizer


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request. The numbers are upstream's."""

    max_messages: int = 500
    max_message_chars: int = 8000
    max_total_chars: int = 32000
    max_temperature: float = 2.0
    max_top_k: int = 200
    max_tokens: int = 4096
    max_choices: int = 8
    max_body_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Defaults:
    """Sampling of a request that does not say."""

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    max_tokens: int = 512


_PERIODS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}


@dataclass(frozen=True, slots=True)
class Rate:
    """`count` requests in `period_s` seconds."""

    count: int
    period_s: int

    @classmethod
    def parse(cls, text: str) -> Rate | None:
        """ "30/minute" and the like; None for an empty text. Raises UserError."""
        if not text:
            return None
        found = re.fullmatch(r"(\d{1,9})/(second|minute|hour|day)", text.strip())
        if found is None or not int(found[1]):
            raise UserError(f"--rate-limit={text} is not a rate; write 30/minute, or per second, hour, day")
        return cls(int(found[1]), _PERIODS[found[2]])


@dataclass(frozen=True, slots=True)
class Settings:
    """The server's configuration. Times are in seconds."""

    defaults: Defaults = field(default_factory=Defaults)
    limits: Limits = field(default_factory=Limits)
    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    system_prompt: str = ""
    context_policy: str = "truncate"
    rate_limit: Rate | None = None
    max_queue: int = 64
    queue_timeout: float = 60.0
    request_timeout: float = 300.0
    session_ttl: float = 3600.0
    max_sessions: int = 1000
    session_db: str = ""
    log_conversations: bool = False
    reload_on_sighup: bool = False
    ui: bool = True
    metrics: bool = True


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is served: name, checkpoint family and tag, step, context in tokens, device and dtype."""

    name: str
    source: str
    tag: str
    step: int | None
    created: int
    context_length: int
    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Replica:
    """One copy of the model, ready to generate, in a process of its own."""

    engine: Engine
    tokenizer: RustBPETokenizer
    info: ModelInfo


def server_version() -> str:
    """Version of the installed project, or "source" when it runs from a checkout."""
    try:
        return version("nanochat")
    except PackageNotFoundError:
        return "source"
