"""A conversation with a model that a server keeps: `scripts.chat_web`, here or on another machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import requests

from nanochat.common import UserError
from nanochat.dialogue import Dialogue, Notice, Reply, Show

CONNECT_S, SILENCE_S = 10.0, 60.0  # the server says something at least every 15 s
KINDS = {"call": "python", "output": "python_output"}


@dataclass
class RemoteChat(Dialogue):
    """A conversation over HTTP. url: where the server listens; api_key: sent if not empty."""

    url: str
    api_key: str = ""
    config: dict[str, Any] = field(init=False)
    last_usage: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self.config = self._call("GET", "/config").json()
        if not self.config.get("model"):
            raise UserError(f"{self.url} is still loading its model; try again in a moment")

    @property
    def context(self) -> int:
        return self.config["context_length"]

    def used_tokens(self) -> int:
        return self.last_usage if self.messages else 0

    def _generate(self, show: Show, notice: Notice) -> Reply:
        parts: list[dict[str, str]] = []
        begun, first_s, count, prompt_tokens, reason = time.perf_counter(), 0.0, 0, 0, "error"
        try:
            with self._call("POST", "/chat/completions", self._body()) as response:
                for event in _events(response):
                    if event.get("start") and event.get("warning"):
                        notice(event["warning"])
                    if event.get("start") and event.get("truncated_messages"):
                        notice(f"too long: its first {event['truncated_messages']} messages are left out")
                    prompt_tokens = event.get("prompt_tokens", prompt_tokens)
                    if "error" in event:
                        raise UserError(str(event["error"].get("message", event["error"])))
                    if event.get("done"):
                        reason, count = event["finish_reason"], event["usage"]["completion_tokens"]
                    if "token" in event or "tool" in event:
                        first_s = first_s or time.perf_counter() - begun
                        count += 1
                        self._take(event, parts, show)
        except KeyboardInterrupt:
            reason = "cancelled"
        except requests.RequestException as error:
            raise UserError(f"the connection to {self.url} broke: {_cause(error)}") from None
        if reason == "error":
            raise UserError(f"{self.url} ended the answer early")
        self.last_usage = prompt_tokens + count
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        return Reply(parts, text, reason, prompt_tokens, count, first_s, time.perf_counter() - begun)

    def _take(self, event: dict[str, Any], parts: list[dict[str, str]], show: Show) -> None:
        kind = KINDS[event["tool"]] if "tool" in event else "text"
        text = event["text"] if "tool" in event else event["token"]
        if kind == "text" and parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += text
        else:
            parts.append({"type": kind, "text": text})
        show(kind, text)

    def _body(self) -> dict[str, Any]:
        return {
            "messages": self.messages,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens or min(self.context, self.config["limits"]["max_tokens"]),
            "seed": self._next_seed(),
            "events": "full",
            **({"system": self.system} if self.system else {}),
            **({"stop": self.stop} if self.stop else {}),
        }

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> requests.Response:
        """One request. Raises UserError for a server that is not there or refuses."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            response = requests.request(
                method,
                self.url + path,
                json=body,
                headers=headers,
                stream=True,
                timeout=(CONNECT_S, SILENCE_S),
            )
        except (requests.RequestException, UnicodeError) as error:
            text = f"no server at {self.url}: {_cause(error)}; start one with python -m scripts.chat_web"
            raise UserError(text) from None
        if response.ok:
            return response
        raise UserError(f"{self.url} refuses ({response.status_code}): {_detail(response)}")


def _events(response: requests.Response) -> Iterator[dict[str, Any]]:
    """The events of a stream. Lines, not chunks: a character may be cut by the network."""
    for line in response.iter_lines():
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def _detail(response: requests.Response) -> str:
    try:
        detail = response.json()["detail"]
        if isinstance(detail, list):  # fields of the request that do not fit
            detail = "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in detail)
        return str(detail)[:500]
    except (ValueError, KeyError, TypeError):
        return response.reason or "no reason given"


def _cause(error: Exception) -> str:
    """The innermost reason, without the names of the library's layers."""
    wrong = requests.exceptions
    if isinstance(error, wrong.MissingSchema | wrong.InvalidSchema | wrong.InvalidURL):
        return "this is no address such as http://127.0.0.1:8000"
    while error.__context__ is not None and isinstance(error.__context__, Exception):
        error = error.__context__
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
