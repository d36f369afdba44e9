"""The OpenAI-compatible API through the official client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
import torch

from nanochat.serve.settings import Settings
from tests.serving import (
    GREEDY,
    Served,
    script,
    scripted_replica,
    served,
    user,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(lambda index: scripted_replica(script), Settings(defaults=GREEDY)) as running:
        yield running


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openai_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["nanochat-test"]
    assert client.models.retrieve("nanochat-test").owned_by == "nanochat"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-9")
    assert caught.value.code == "model_not_found"


def test_openai_completion(client: openai.OpenAI):
    reply = client.chat.completions.create(
        model="nanochat-test", messages=user("sum"), logprobs=True, top_logprobs=2
    )
    choice = reply.choices[0]
    assert choice.message.content == "27 + 58 = 85." and choice.finish_reason == "stop"
    assert choice.logprobs.content[0].token == "2" and len(choice.logprobs.content[0].top_logprobs) == 2
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.id.startswith("chatcmpl-") and reply.system_fingerprint.startswith("fp_")


def test_openai_n_and_stop(client: openai.OpenAI):
    reply = client.chat.completions.create(
        model="default", messages=user("hello"), n=3, stop=["l"], temperature=0, max_tokens=50
    )
    assert [choice.message.content for choice in reply.choices] == ["1:he"] * 3
    cut = client.chat.completions.create(model="default", messages=user("hello"), max_completion_tokens=2)
    assert cut.choices[0].message.content == "1:" and cut.choices[0].finish_reason == "length"


def test_openai_stream(client: openai.OpenAI):
    stream = client.chat.completions.create(
        model="nanochat-test", messages=user("emoji"), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "\u00e4\u6f22\U0001f600!"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 10
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_openai_conversation_with_tool_parts(client: openai.OpenAI):
    first = client.chat.completions.create(model="default", messages=user("sum"))
    parts = first.choices[0].message.nanochat_parts
    messages = [*user("sum"), {"role": "assistant", "content": None, "nanochat_parts": parts}, *user("b")]
    second = client.chat.completions.create(model="default", messages=messages)
    assert second.choices[0].message.content == "2:b"
    assert second.usage.prompt_tokens == 1 + 5 + len("27 + 58 = 27+588585.") + 4 + 2 + 3 + 1


def test_openai_errors(client: openai.OpenAI):
    def fails(**body) -> openai.BadRequestError:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": "default", "messages": user("x"), **body})
        return caught.value

    assert fails(temperature=3).param == "temperature"
    assert fails(messages=user("x" * 600)).code == "context_length_exceeded"
    assert fails(tools=[{"type": "function", "function": {"name": "f"}}]).code == "unsupported_parameter"
    assert fails(response_format={"type": "json_object"}).param == "response_format"
    assert fails(messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]).param == "messages.0.role"
    assert fails(messages=[]).param == "messages"


def test_async_client(server: Served):
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            replies = [
                client.chat.completions.create(model="default", messages=user(f"q{i}")) for i in range(5)
            ]
            return [reply.choices[0].message.content or "" for reply in await asyncio.gather(*replies)]

    assert asyncio.run(ask()) == [f"1:q{i}" for i in range(5)]


def test_unknown_paths_and_methods_answer_in_the_apis_shape(server: Served):
    for method, path, status, code in (
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_supported"),
    ):
        response = server.http.request(method, path)
        assert response.status_code == status and response.json()["error"]["code"] == code
