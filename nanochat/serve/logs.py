"""The server's log: a line per request, as text for people or as JSON for machines."""

from __future__ import annotations

import hashlib
import json
import logging
from datetime import datetime, timezone

from nanochat.serve.jobs import Job

logger = logging.getLogger("nanochat.serve")


def start_logging(style: str) -> None:
    """One handler on the server's own logger, which writes "text" or "json" lines to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if style == "json" else TextLines())
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def log_facts(level: int, event: str, facts: dict[str, object]) -> None:
    """Log an event with its facts. They are the server's own words and numbers, never a client's text."""
    logger.log(level, event, extra={"facts": facts})


def job_line(job: Job) -> dict[str, object]:
    """What a request cost, for its line in the log."""
    speed = job.speed()
    return {
        "worker": job.worker,
        "queue_ms": speed["queue_ms"],
        "ttft_ms": speed["ttft_ms"],
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": job.completion_tokens,
        "tokens_per_second": speed["tokens_per_second"],
        "finish_reason": ",".join(choice.finish_reason or "failed" for choice in job.choices),
    }


class TextLines(logging.Formatter):
    """time level event key=value ..."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s%(pairs)s")

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, object] = getattr(record, "facts", {})
        record.pairs = "".join(f" {name}={value}" for name, value in facts.items() if value is not None)
        return super().format(record)


class JsonLines(logging.Formatter):
    """One object per line with the same keys. Addresses of clients are hashed: such logs are kept for long."""

    def format(self, record: logging.LogRecord) -> str:
        facts = dict(getattr(record, "facts", {}))
        if facts.get("remote"):
            facts["remote"] = hashlib.sha256(str(facts["remote"]).encode()).hexdigest()[:12]
        body = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "event": record.getMessage(),
            **facts,
        }
        if record.exc_info:
            body["exception"] = self.formatException(record.exc_info)
        return json.dumps(body, ensure_ascii=False)
