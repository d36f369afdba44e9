"""Bodies of the OpenAI-compatible endpoints, reduced to what the engine understands."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

from nanochat.serve.errors import ApiError
from nanochat.serve.prompt import Message
from nanochat.serve.schemas import Body, Part, Seed, Stop

# What the API defines and this server cannot do: refused unless empty, so that nobody believes it worked.
_UNSUPPORTED = (
    "tools", "functions", "tool_choice", "function_call", "audio", "prediction", "web_search_options",
    "reasoning_effort",
)  # fmt: skip


class ContentPart(BaseModel):
    """A piece of a message's content; only text is understood."""

    type: str
    text: str | None = None


class OpenAIMessage(BaseModel):
    """A message in the words of the OpenAI API; nanochat_parts brings back the tool calls of an answer."""

    role: str
    content: str | list[ContentPart] | None = None
    nanochat_parts: list[Part] | None = None


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class OpenAISampling(Body):
    """What both kinds of completions have in common."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=200)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | None = None
    seed: Seed | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None

    @property
    def num_choices(self) -> int:
        """Answers per prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatCompletionRequest(OpenAISampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[OpenAIMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: Any = None
    function_call: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to report per token; None for no log probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextCompletionRequest(OpenAISampling):
    """POST /v1/completions: text or token ids to continue, one prompt or several."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


def refuse_unsupported(body: ChatCompletionRequest) -> None:
    """400 for features that would silently do nothing."""
    for name in _UNSUPPORTED:
        if getattr(body, name) not in (None, [], {}, "none", "auto", 0):
            raise _unsupported(name)
    if body.response_format and body.response_format.get("type") != "text":
        raise _unsupported("response_format")
    if body.modalities not in (None, ["text"]):
        raise _unsupported("modalities")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "invalid_value", "top_logprobs needs logprobs: true", param="top_logprobs")


def refuse_unsupported_text(body: TextCompletionRequest) -> None:
    """The same for plain completions."""
    if body.suffix:
        raise _unsupported("suffix")
    if body.best_of not in (None, body.num_choices):
        raise _unsupported("best_of")
    if body.echo and body.logprobs is not None:
        text = "the log probabilities of the prompt are not known: echo and logprobs exclude each other"
        raise ApiError(400, "unsupported_parameter", text, param="echo")


def plain_messages(messages: list[OpenAIMessage]) -> list[Message]:
    """The conversation in the project's own format. Raises ApiError 400."""
    return [_plain(message, f"messages.{index}") for index, message in enumerate(messages)]


def _plain(message: OpenAIMessage, param: str) -> Message:
    role = "system" if message.role == "developer" else message.role
    if role not in ("system", "user", "assistant"):
        raise ApiError(400, "invalid_value", f"role {role[:40]!r} is not supported", param=f"{param}.role")
    if role == "assistant" and message.nanochat_parts is not None:
        return {"role": role, "content": [part.model_dump() for part in message.nanochat_parts]}
    text = _text(message.content, param)
    if role == "user" and not text:
        raise ApiError(400, "invalid_value", "a user message needs content", param=f"{param}.content")
    return {"role": role, "content": text}


def _text(content: str | list[ContentPart] | None, param: str) -> str:
    if not isinstance(content, list):
        return content or ""
    if any(part.type != "text" for part in content):
        raise ApiError(
            400, "unsupported_parameter", "only text content is supported", param=f"{param}.content"
        )
    return "".join(part.text or "" for part in content)


def _unsupported(name: str) -> ApiError:
    return ApiError(400, "unsupported_parameter", f"{name} is not supported by this server", param=name)
