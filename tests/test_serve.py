"""The server over HTTP: both chat APIs, sessions, limits, disconnects and failing workers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from nanochat.answer_parts import Delta, PartsDecoder
from nanochat.engine import SamplingParams
from nanochat.serve.errors import ApiError
from nanochat.serve.jobs import MAILBOX_PIECES, Job, Piece, new_choice
from nanochat.serve.prompt import build_prompt
from nanochat.serve.settings import Limits, Settings
from tests.serving import (
    GREEDY,
    TOOL_ANSWER,
    Served,
    byte_tokenizer,
    encode_marked,
    events,
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


# --- the server about itself -------------------------------------------------------------------------


def test_status_endpoints_have_upstreams_keys(server: Served):
    health = server.http.get("/health").json()
    assert health["status"] == "ok" and health["ready"] is True
    assert health["num_gpus"] == 1 and health["available_workers"] == 1
    stats = server.http.get("/stats").json()
    assert {"total_workers", "available_workers", "busy_workers", "workers"} <= stats.keys()
    assert stats["workers"][0]["device"] == "cpu" and stats["workers"][0]["gpu_id"] == 0
    config = server.http.get("/config").json()
    assert config["defaults"]["temperature"] == 0 and config["context_length"] == 512
    assert server.http.get("/ready").status_code == 200


def test_page_and_headers(server: Served):
    page = server.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert server.http.get("/logo.svg").headers["content-type"] == "image/svg+xml"
    assert server.http.get("/static/app.js").status_code == 200
    assert server.http.get("/health", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert server.http.get("/health", headers={"X-Request-ID": "a b"}).headers["x-request-id"] != "a b"


def test_metrics_move(server: Served):
    def total(name: str) -> float:
        families = text_string_to_metric_families(server.http.get("/metrics").text)
        return sum(s.value for family in families for s in family.samples if s.name == name)

    before = total("nanochat_completion_tokens_total")
    calls = total("nanochat_tool_calls_total")
    server.http.post("/chat", json={"message": "sum"})
    assert total("nanochat_completion_tokens_total") == before + len("27 + 58 = 27+5885.85.") - 3 + 4 + 2
    assert total("nanochat_tool_calls_total") == calls + 1


# --- POST /chat/completions --------------------------------------------------------------------------


def test_upstreams_stream_shape(server: Served):
    got = events(server, messages=user("hello"))
    assert got[-1] == {"done": True}
    assert all(event.keys() == {"token", "gpu"} for event in got[:-1])
    assert "".join(event["token"] for event in got[:-1]) == "1:hello"


def test_characters_split_over_tokens_arrive_whole(server: Served):
    got = events(server, messages=user("emoji"))
    assert [event["token"] for event in got[:-1]] == ["\u00e4", "\u6f22", "\U0001f600", "!"]


def test_incomplete_tail_is_sent_as_replacement(server: Served):
    got = events(server, messages=user("emoji"), max_tokens=7)
    assert "".join(event["token"] for event in got[:-1]) == "\u00e4\u6f22\ufffd"


def test_special_tokens_are_no_text_unless_raw(server: Served):
    assert "".join(e.get("token", "") for e in events(server, messages=user("special"))) == "ab"
    raw = events(server, messages=user("sum"), raw_special_tokens=True)
    assert "".join(e.get("token", "") for e in raw) == TOOL_ANSWER


def test_full_events_show_the_tool_and_the_costs(server: Served):
    got = events(server, messages=user("sum"), events="full")
    assert got[0]["start"] and got[0]["prompt_tokens"] == len("sum") + 4
    assert [e for e in got if "tool" in e] == [
        {"tool": "call", "text": "27+58"},
        {"tool": "output", "text": "85"},
    ]
    done = got[-1]
    assert done["finish_reason"] == "stop" and done["usage"]["prompt_tokens"] == 7
    assert done["parts"] == [
        {"type": "text", "text": "27 + 58 = "},
        {"type": "python", "text": "27+58"},
        {"type": "python_output", "text": "85"},
        {"type": "text", "text": "85."},
    ]


def test_parts_render_back_to_the_generated_ids(server: Served):
    tokenizer = byte_tokenizer()
    parts = events(server, messages=user("sum"), events="full")[-1]["parts"]
    messages = [*user("sum"), {"role": "assistant", "content": parts}, *user("next")]
    prompt = build_prompt(tokenizer, messages, max_tokens=10, context_length=512)
    generated = encode_marked(tokenizer, f"<|assistant_start|>{TOOL_ANSWER}<|assistant_end|>")
    text = tokenizer.decode(generated)
    assert text in tokenizer.decode(prompt.tokens)
    start = prompt.tokens.index(generated[0])
    assert prompt.tokens[start : start + len(generated)] == generated


def test_stop_strings_cut_the_text(server: Served):
    body = {"messages": user("sum"), "stop": "8", "stream": False}
    got = server.http.post("/chat/completions", json=body).json()
    assert got["response"] == "27 + 5" and got["finish_reason"] == "stop"


def test_seed_and_logprobs(server: Served):
    body = {"messages": user("hello"), "temperature": 1.5, "top_k": 0, "seed": 5, "logprobs": 3}
    first, second = (events(server, **body) for _ in range(2))
    assert first == second
    assert events(server, **{**body, "seed": 6}) != first
    scores = [score for event in first for score in event.get("logprobs", [])]
    assert scores and all(len(score["top_logprobs"]) == 3 and score["logprob"] <= 0 for score in scores)


def test_empty_answer_does_not_poison_the_conversation(server: Served):
    messages = [*user("empty"), {"role": "assistant", "content": ""}, *user("again")]
    assert "".join(e.get("token", "") for e in events(server, messages=messages)) == "2:again"


def test_an_open_answer_is_continued(server: Served):
    messages = [*user("hello"), {"role": "assistant", "content": "1:he"}]
    got = events(server, messages=messages, continue_final_message=True)
    assert "".join(e.get("token", "") for e in got) == "llo"


LIMITS = Limits()
REFUSED = [
    ({"messages": []}, "no_messages"),
    ({"messages": user("x") * (LIMITS.max_messages + 1)}, "too_many_messages"),
    ({"messages": [*user("x"), *user("")]}, "empty_message"),
    ({"messages": user("x" * (LIMITS.max_message_chars + 1))}, "message_too_long"),
    ({"messages": user("x" * 8000) * 4 + user("x")}, "conversation_too_long"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_role"),
    ({"messages": user("x"), "temperature": 2.01}, "invalid_temperature"),
    ({"messages": user("x"), "temperature": -0.01}, "invalid_temperature"),
    ({"messages": user("x"), "top_k": 201}, "invalid_top_k"),
    ({"messages": user("x"), "max_tokens": 0}, "invalid_max_tokens"),
    ({"messages": user("x"), "max_tokens": 4097}, "invalid_max_tokens"),
    ({"messages": user("x"), "top_p": 1.01}, "invalid_top_p"),
    ({"messages": [{"role": "bad", "content": "x"}], "temperature": 9}, "invalid_role"),
    ({"messages": user("x" * 600)}, "context_length_exceeded"),
]


@pytest.mark.parametrize(
    ("body", "code"), REFUSED, ids=[f"{i}-{code}" for i, (_, code) in enumerate(REFUSED)]
)
def test_limits_refuse(server: Served, body: dict, code: str):
    response = server.http.post("/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["code"] == code and isinstance(response.json()["detail"], str)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": user("x"), "temperature": 2, "top_k": 200, "top_p": 0, "max_tokens": 4096},
        {"messages": user("x"), "temperature": 0, "top_k": 0, "max_tokens": 1},
        {"messages": user("x") * 60},
    ],
)
def test_limits_accept_their_bounds(server: Served, body: dict):
    assert events(server, **body)[-1] == {"done": True}


def test_schema_errors_never_crash(server: Served):
    for raw in (
        b"{",
        b'{"messages": 5}',
        b'{"messages": [], "max_tokens": NaN}',
        b'{"messages": [{"role": "\\ud800"}]}',
    ):
        response = server.http.post(
            "/chat/completions", content=raw, headers={"content-type": "application/json"}
        )
        assert response.status_code in (400, 422), raw
        response.json()


@pytest.mark.parametrize(
    ("raw", "media", "problem"),
    [
        (b"{bad", "application/json", "no valid JSON: Expecting property name .*, at character 1"),
        (b'{"messages": []}', "application/x-www-form-urlencoded", "Content-Type: application/json"),
        (b'{"messages": []}', "", "Content-Type: application/json, not without"),
        (b"", "application/json", "JSON object is missing"), (b"[1]", "application/json", "must be a JSON object"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_body_is_said_in_words(server: Served, raw: bytes, media: str, problem: str):
    headers = {"content-type": media} if media else {}
    native = server.http.post("/chat", content=raw, headers=headers)
    assert native.status_code == 422 and re.search(problem, native.json()["detail"][0]["msg"])
    compatible = server.http.post("/v1/chat/completions", content=raw, headers=headers)
    error = compatible.json()["error"]
    assert compatible.status_code == 400 and re.match(f"body: .*{problem}", error["message"])
    assert error["param"] is None


def test_body_limit(server: Served):
    assert server.http.post("/chat", content=b"x" * ((1 << 20) + 1)).status_code == 413
    chunks = (b"x" * 1000 for _ in range(1100))
    assert server.http.post("/chat", content=chunks).status_code == 413


# --- context ------------------------------------------------------------------------------------------


def test_old_exchanges_make_room_and_the_system_text_stays():
    tokenizer = byte_tokenizer()
    messages = [{"role": "system", "content": "SYS"}]
    for index in range(10):
        messages += [*user(f"question {index}"), {"role": "assistant", "content": f"answer {index}"}]
    messages += user("last")
    prompt = build_prompt(tokenizer, messages, max_tokens=100, context_length=128)
    text = tokenizer.decode(prompt.tokens)
    assert text.startswith("<|bos|><|user_start|>SYS\n\nquestion ")
    assert text.endswith("<|user_start|>last<|user_end|><|assistant_start|>")
    assert prompt.truncated_messages % 2 == 0 and 0 < prompt.truncated_messages < 20
    assert len(prompt.tokens) + 16 <= 128 and prompt.max_tokens == 128 - len(prompt.tokens)
    with pytest.raises(ApiError, match="context of the model 128"):
        build_prompt(tokenizer, messages, max_tokens=100, context_length=128, policy="error")
    whole = build_prompt(tokenizer, messages, max_tokens=100, context_length=128, policy="extend")
    assert whole.extended and whole.max_tokens == 100 and not whole.truncated_messages
    assert all(f"question {index}" in tokenizer.decode(whole.tokens) for index in range(10))
    assert not build_prompt(
        tokenizer, user("short"), max_tokens=9, context_length=128, policy="extend"
    ).extended
    with pytest.raises(ApiError, match="context of the model 160"):
        build_prompt(tokenizer, messages, max_tokens=100, context_length=16, policy="extend")


def test_a_server_may_go_beyond_the_trained_context():
    extending = Settings(defaults=GREEDY, context_policy="extend")
    with served(lambda index: scripted_replica(lambda questions: "x" * 200, context=64), extending) as server:
        short = server.http.post("/chat", json={"message": "hi", "max_tokens": 8}).json()
        long = server.http.post("/chat", json={"message": "m" * 100, "max_tokens": 70}).json()
        events = server.http.post(
            "/chat/completions", json={"messages": user("m" * 100), "max_tokens": 3, "events": "full"}
        ).text
        strict = server.http.post(
            "/v1/chat/completions", json={"model": "nanochat-test", "messages": user("m" * 100)}
        )
    assert "warning" not in short and short["response"] == "x" * 8
    assert "trained context" in long["warning"] and long["response"] == "x" * 70
    assert "trained context" in events.partition("\n\n")[0]
    assert strict.status_code == 400 and "context" in strict.json()["error"]["message"]


@settings(deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=7), st.booleans())
def test_prompt_equals_the_renderer_of_training(texts: list[str], with_system: bool):
    tokenizer = byte_tokenizer()
    texts = texts if len(texts) % 2 else texts[:-1] or ["x"]
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    if with_system:
        messages.insert(0, {"role": "system", "content": "be brief"})
    prompt = build_prompt(tokenizer, messages, max_tokens=10, context_length=10_000)
    conversation = {"messages": [*messages, {"role": "assistant", "content": "?"}]}
    assert prompt.tokens == tokenizer.render_for_completion(conversation, 10_000)


# --- decoding -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_stop_strings_equal_cutting_the_whole_text(text: str, stop: list[str]):
    tokenizer = byte_tokenizer()
    decoder = PartsDecoder(tokenizer, stop)
    shown = "".join(d.text for token in tokenizer.encode(text) for d in decoder.push(token))
    shown += "".join(delta.text for delta in decoder.flush())
    text = text.encode("utf-8", "replace").decode()
    cuts = [text[: text.index(word)] for word in stop if word in text]
    # The word whose end comes first wins; among those that start first the text is the shortest.
    ends = [text.index(word) + len(word) for word in stop if word in text]
    assert shown == (text if not cuts else min(zip(ends, cuts, strict=True))[1]) or shown in cuts


@pytest.mark.parametrize("num_choices", [1, 3])
def test_a_lagging_reader_gets_merged_text(num_choices: int):
    async def scenario() -> tuple[int, list[str]]:
        choices = [new_choice(byte_tokenizer(), SamplingParams()) for _ in range(num_choices)]
        job = Job([[1]], choices, 10)
        for i in range(5 * MAILBOX_PIECES):
            job.deliver([Piece(choice, Delta("text", str(i % 10))) for choice in range(num_choices)])
        texts = [""] * num_choices
        for item in job._items:
            assert isinstance(item, Piece)
            texts[item.choice] += item.delta.text
        return len(job._items), texts

    count, texts = asyncio.run(scenario())
    assert count == MAILBOX_PIECES and texts == ["0123456789" * (MAILBOX_PIECES // 2)] * num_choices


# --- POST /chat and sessions --------------------------------------------------------------------------


def test_minimal_contract(server: Served):
    answer = server.http.post("/chat", json={"message": "hello"}).json()
    assert answer["response"] == "1:hello" and answer["finish_reason"] == "stop"


def test_session_remembers_and_is_isolated(server: Served):
    first = server.http.post("/chat", json={"message": "a"}).json()
    again = {"message": "b", "session_id": first["session_id"]}
    assert server.http.post("/chat", json=again).json()["response"] == "2:b"
    assert server.http.post("/chat", json={"message": "c"}).json()["response"] == "1:c"
    assert server.http.post("/chat", json={**again, "reset": True}).json()["response"] == "1:b"
    unknown = server.http.post("/chat", json={"message": "x", "session_id": "nope"})
    assert unknown.status_code == 404 and unknown.json()["code"] == "session_not_found"
    assert server.http.post("/chat", json={"message": "x", "stateless": True}).json()["session_id"] is None


def test_session_lifecycle(server: Served):
    session = server.http.post("/sessions", json={"title": "T", "params": {"max_tokens": 3}}).json()
    path = f"/sessions/{session['id']}"
    answer = server.http.post("/chat", json={"message": "hello", "session_id": session["id"]}).json()
    assert answer["response"] == "1:h" and answer["finish_reason"] == "length"
    server.http.patch(path, json={"params": {"max_tokens": 5}})
    assert server.http.post(f"{path}/regenerate").json()["response"] == "1:hel"
    messages = server.http.get(path).json()["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    exported = server.http.get(f"{path}/export", params={"format": "jsonl"}).text
    assert json.loads(exported) == messages
    assert "1:hel" in server.http.get(f"{path}/export", params={"format": "markdown"}).text
    assert session["id"] in [one["id"] for one in server.http.get("/sessions").json()["sessions"]]
    assert server.http.post(f"{path}/truncate", json={"index": 0}).json()["messages"] == []
    assert server.http.delete(path).status_code == 204
    assert server.http.get(path).status_code == 404


# --- tokens -------------------------------------------------------------------------------------------


def test_text_to_tokens_and_back(server: Served):
    text = "a\u6f22<|bos|>"
    encoded = server.http.post("/tokenize", json={"text": text}).json()
    assert encoded == {"tokens": list(text.encode()), "count": 11}
    assert server.http.post("/detokenize", json={"tokens": encoded["tokens"]}).json() == {"text": text}
    assert server.http.post("/detokenize", json={"tokens": [256, 97]}).json() == {"text": "<|bos|>a"}
    for path, body in (("/tokenize", {"text": "x" * 32_001}), ("/detokenize", {"tokens": [265]})):
        assert server.http.post(path, json=body).status_code == 400


# --- no body breaks the server ------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": VALUES}),
    max_size=4,
)
NAMES = st.sampled_from(
    [
        "message", "model", "temperature", "top_k", "top_p", "min_p", "max_tokens",
        "seed", "stop", "n", "logprobs", "top_logprobs", "logit_bias", "stream",
        "system", "title", "params", "session_id", "events", "tools", "index",
    ]
)  # fmt: skip
POSTS = [
    "/chat", "/chat/completions", "/v1/chat/completions", "/v1/completions", "/sessions", "/sessions/x/truncate",
    "/sessions/x/regenerate", "/tokenize", "/detokenize",
]  # fmt: skip
BODIES = st.builds(
    lambda messages, rest: {"messages": messages, "model": "default", "message": "x", **rest},
    MESSAGES | VALUES,
    st.dictionaries(NAMES, VALUES, max_size=4),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(POSTS), BODIES | VALUES)
def test_any_body_gets_an_answer(server: Served, path: str, body: object):
    response = server.http.post(path, json=body)
    assert response.status_code < 500, response.text
    assert server.pool.workers[0].num_failed == 0


BROKEN = st.binary(max_size=40) | st.sampled_from(
    [
        b"[" * 100_000, b'{"message": ' + b"9" * 5000 + b"}", b'{"message": "\\ud800", "model": "default"}',
        b'{"message": "x", "temperature": Infinity}', b'{"message": "a\\u0000b"}', b"\xff\xfe{}", b"",
    ]
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(POSTS), BROKEN)
def test_bytes_that_are_no_json_get_an_answer(server: Served, path: str, body: bytes):
    response = server.http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code < 500, response.text
    assert "error" in response.json() or "detail" in response.json() or response.status_code < 300
