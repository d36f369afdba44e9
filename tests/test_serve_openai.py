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
    idle,
    script,
    scripted_replica,
    served,
    user,
    wait_for,
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
    assert "repetition_penalty=1e-300" in fails(extra_body={"repetition_penalty": 1e-300}).message
    assert fails(messages=user("x" * 600)).code == "context_length_exceeded"
    assert fails(tools=[{"type": "function", "function": {"name": "f"}}]).code == "unsupported_parameter"
    assert fails(response_format={"type": "json_object"}).param == "response_format"
    assert fails(messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]).param == "messages.0.role"
    assert fails(messages=[]).param == "messages"


def test_async_client(server: Served):
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.completions.create(model="default", prompt="q", stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == "raw:q"
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(model="default", prompt="q", temperature=9)
            replies = [
                client.chat.completions.create(model="default", messages=user(f"q{i}")) for i in range(5)
            ]
            return [reply.choices[0].message.content or "" for reply in await asyncio.gather(*replies)]

    assert asyncio.run(ask()) == [f"1:q{i}" for i in range(5)]


def test_async_client_has_every_feature(server: Served):
    async def scenario(client: openai.AsyncOpenAI) -> None:
        assert [model.id async for model in client.models.list()] == ["nanochat-test"]
        reply = await client.chat.completions.create(
            model="default", messages=user("hello"), n=2, stop=["l"], seed=3, logprobs=True, top_logprobs=2
        )
        assert [choice.message.content for choice in reply.choices] == ["1:he"] * 2
        assert all(len(c.logprobs.content[0].top_logprobs) == 2 for c in reply.choices if c.logprobs)
        assert reply.usage and reply.usage.prompt_tokens == 9 and reply.usage.completion_tokens >= 8
        stream = await client.chat.completions.create(
            model="default", messages=user("emoji"), stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert (
            "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            == "\u00e4\u6f22\U0001f600!"
        )
        assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 10
        again = [
            await client.completions.create(model="default", prompt="q", seed=5, temperature=2)
            for _ in range(2)
        ]
        assert again[0].choices[0].text == again[1].choices[0].text
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt-9")

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            await scenario(client)

    asyncio.run(run())


def test_a_stream_that_is_closed_ends_the_work(server: Served, client: openai.OpenAI):
    server.model.pause_s = 0.01
    try:
        with client.chat.completions.create(model="default", messages=user("long"), stream=True) as stream:
            next(iter(stream))
        wait_for(lambda: idle(server))
    finally:
        server.model.pause_s = 0.0


def test_error_classes():
    """Each failure is the class that the API's clients know, and says whether to try again."""
    tight = Settings(defaults=GREEDY, max_queue=0, request_timeout=1.0, api_keys=("k",))
    with served(lambda index: scripted_replica(script, max_batch=8), tight, pause_s=0.02) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)

        def create(**body):
            return client.chat.completions.create(**{"model": "default", "messages": user("long"), **body})

        with pytest.raises(openai.AuthenticationError) as refused:
            client.with_options(api_key="wrong").models.list()
        assert refused.value.code == "invalid_api_key"
        stream = create(stream=True, n=8, max_tokens=400)
        wait_for(lambda: server.pool.workers[0].num_running == 8)
        with pytest.raises(openai.RateLimitError) as full:
            create()
        assert full.value.code == "queue_full" and int(full.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.APIError) as cut:
            list(stream)
        assert cut.value.code == "request_timeout"
        with pytest.raises(openai.InternalServerError) as late:
            create(max_tokens=400)
        assert late.value.status_code == 504 and late.value.code == "request_timeout"
        assert late.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.APIStatusError) as large:
            create(messages=user("x" * (1 << 20)))
        assert large.value.status_code == 413 and large.value.code == "request_too_large"
        with pytest.raises(openai.APITimeoutError):
            create(timeout=0.05)


# --- /v1/completions -----------------------------------------------------------------------------------


def test_text_is_continued_without_markers(client: openai.OpenAI):
    reply = client.completions.create(model="default", prompt="hi")
    assert reply.object == "text_completion" and reply.id.startswith("cmpl-")
    assert reply.choices[0].text == "raw:hi" and reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens == 3 and reply.usage.completion_tokens == 6
    cut = client.completions.create(model="default", prompt="a long text " * 3)
    assert cut.usage.completion_tokens == 16 and cut.choices[0].finish_reason == "length"


def test_text_of_several_prompts_and_choices(client: openai.OpenAI):
    reply = client.completions.create(model="default", prompt=["a", "bc"], n=2, echo=True)
    assert [choice.text for choice in reply.choices] == ["araw:a", "araw:a", "bcraw:bc", "bcraw:bc"]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage.prompt_tokens == 2 + 3
    ids = client.completions.create(model="default", prompt=[[256, 97], [256, 98]], stop=":")
    assert [choice.text for choice in ids.choices] == ["raw", "raw"]
    assert client.completions.create(model="default", prompt=[256, 97]).choices[0].text == "raw:a"


def test_text_logprobs(client: openai.OpenAI):
    reply = client.completions.create(model="default", prompt="\u00e4", logprobs=2)
    scores = reply.choices[0].logprobs
    assert reply.choices[0].text == "raw:\u00e4" and scores.tokens[:4] == list("raw:")
    assert scores.text_offset == [0, 1, 2, 3, 4, 4], "the two bytes of a character begin at the same place"
    assert scores.token_logprobs[0] == pytest.approx(-0.313, abs=0.01)
    assert scores.top_logprobs[0]["r"] == scores.token_logprobs[0] and "s" in scores.top_logprobs[0]


def test_text_stream(client: openai.OpenAI):
    stream = client.completions.create(
        model="default", prompt=["a", "b"], stream=True, echo=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    texts = ["", ""]
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["araw:a", "braw:b"] and len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 10
    assert sorted(c.choices[0].finish_reason or "" for c in chunks[:-1])[-2:] == ["stop", "stop"]


def test_text_calls_no_tool(client: openai.OpenAI):
    reply = client.completions.create(model="default", prompt="tool", max_tokens=40)
    assert reply.choices[0].text == "1+1" and reply.choices[0].finish_reason == "stop"


def test_text_errors(client: openai.OpenAI):
    def fails(**body) -> openai.BadRequestError:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{"model": "default", "prompt": "x", **body})
        return caught.value

    assert fails(prompt="x" * 600).code == "context_length_exceeded"
    assert fails(prompt=[]).param == "prompt" and fails(prompt=[[]]).param == "prompt"
    assert fails(prompt=[10**6]).param == "prompt" and fails(prompt=[-1]).param == "prompt"
    assert fails(prompt=["x"] * 9).code == "invalid_value"
    assert fails(echo=True, logprobs=1).code == "unsupported_parameter"
    assert fails(suffix="y").param == "suffix" and fails(best_of=3).param == "best_of"
    assert fails(logprobs=6).param == "logprobs"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-9", prompt="x")


# --- determinism, streams of the client, errors ------------------------------------------------------------


def test_a_seed_repeats_an_answer(client: openai.OpenAI):
    def ask(seed: int | None) -> list[str | None]:
        reply = client.chat.completions.create(
            model="default", messages=user("hello there"), n=2, seed=seed, temperature=2, top_p=1
        )
        return [choice.message.content for choice in reply.choices]

    first = ask(7)
    assert first == ask(7) and first[0] != first[1] and first != ask(8)


def test_streamed_logprobs_and_the_clients_own_stream(client: openai.OpenAI):
    with client.chat.completions.stream(
        model="default", messages=user("hello"), n=2, logprobs=True, top_logprobs=1
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.done"} <= kinds
    for choice in final.choices:
        assert choice.message.content == "1:hello" and choice.finish_reason == "stop"
        assert "".join(one.token for one in choice.logprobs.content) == "1:hello"


def test_a_late_failure_ends_a_stream_with_an_error(server: Served, client: openai.OpenAI):
    server.model.pause_s = 0.02
    try:
        stream = client.chat.completions.create(model="default", messages=user("long"), stream=True)
        with pytest.raises(openai.APIError, match="the model failed"):
            for count, _ in enumerate(stream):
                server.model.fail_next = server.model.fail_next or count == 3
    finally:
        wait_for(lambda: server.pool.ready)
    with pytest.raises(openai.InternalServerError) as caught:
        server.model.fail_next = True
        client.chat.completions.create(model="default", messages=user("a"))
    assert caught.value.code == "worker_failed"
    assert caught.value.response.headers["x-should-retry"] == "false"
    wait_for(lambda: server.pool.ready)


def test_unknown_paths_and_methods_answer_in_the_apis_shape(server: Served):
    for method, path, status, code in (
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_supported"),
    ):
        response = server.http.request(method, path)
        assert response.status_code == status and response.json()["error"]["code"] == code
