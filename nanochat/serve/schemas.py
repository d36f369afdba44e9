"""Bodies of the native endpoints, and the checks whose order and wording clients may rely on."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from nanochat.serve.errors import ApiError
from nanochat.serve.settings import Limits

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stop = str | list[str]


class Body(BaseModel):
    """A body whose strings are all text: JSON can spell halves of characters, which no tokenizer can read."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        todo = [value]
        while todo:
            one = todo.pop()
            if isinstance(one, dict):
                todo += [*one.keys(), *one.values()]
            elif isinstance(one, list):
                todo += one
            elif isinstance(one, str):
                try:
                    one.encode()
                except UnicodeEncodeError:
                    raise ValueError("a string has a lone surrogate, which is no character") from None
        return value


class Part(BaseModel):
    """A piece of an assistant message; the format of the training data."""

    type: Literal["text", "python", "python_output"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    role: str
    content: str | list[Part]

    @property
    def num_chars(self) -> int:
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return sum(map(len, parts))


class Sampling(Body):
    """How to sample; missing or null means the server's default."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: Seed | None = None
    stop: Stop | None = None


class CompletionRequest(Sampling):
    """POST /chat/completions: a whole conversation, answered as a stream."""

    messages: list[Message]
    system: str | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    stream: bool = True
    events: Literal["basic", "full"] = "basic"
    raw_special_tokens: bool = False
    continue_final_message: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class ChatRequest(Sampling):
    """POST /chat: one message of a conversation that the server keeps."""

    message: str
    session_id: str | None = None
    system: str | None = None
    reset: bool = False
    stateless: bool = False


def check_messages(messages: list[Message], limits: Limits) -> None:
    """Refuse an unusable conversation with 400, in upstream's order of checks."""
    if not messages:
        raise ApiError(400, "no_messages", "at least one message is required", param="messages")
    if len(messages) > limits.max_messages:
        text = f"{len(messages)} messages are too many; at most {limits.max_messages} are allowed"
        raise ApiError(400, "too_many_messages", text, param="messages")
    for index, message in enumerate(messages):
        if message.role == "user" and not message.content:
            raise ApiError(400, "empty_message", f"message {index} has no content", param="messages")
        if message.num_chars > limits.max_message_chars:
            text = f"message {index} is longer than {limits.max_message_chars} characters"
            raise ApiError(400, "message_too_long", text, param="messages")
    if sum(message.num_chars for message in messages) > limits.max_total_chars:
        text = f"the conversation is longer than {limits.max_total_chars} characters"
        raise ApiError(400, "conversation_too_long", text, param="messages")
    for index, message in enumerate(messages):
        if message.role not in ("user", "assistant", "system"):
            text = f"message {index} has role {message.role[:40]!r}; use user, assistant or system"
            raise ApiError(400, "invalid_role", text, param="messages")
        if message.role != "assistant" and not isinstance(message.content, str):
            raise ApiError(400, "invalid_role", f"message {index}: only answers have parts", param="messages")


def check_sampling(sampling: Sampling, limits: Limits) -> None:
    """Refuse sampling settings that are out of range with 400."""
    _check_range("temperature", sampling.temperature, 0.0, limits.max_temperature)
    _check_range("top_k", sampling.top_k, 0, limits.max_top_k)
    _check_range("max_tokens", sampling.max_tokens, 1, limits.max_tokens)
    _check_range("top_p", sampling.top_p, 0.0, 1.0)


def stop_strings(stop: Stop | None) -> tuple[str, ...]:
    """At most four non-empty stop strings; 400 otherwise."""
    words = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(words) > 4 or not all(words):
        text = "stop must be a string or up to four strings, none of them empty"
        raise ApiError(400, "invalid_value", text, param="stop")
    return words


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        text = f"{name} must be between {low} and {high}"
        raise ApiError(400, f"invalid_{name}", text, param=name)
