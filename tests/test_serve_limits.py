"""Rate limits, the log of requests, and what the server says about its device."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import openai
import pytest
import torch
from websockets.sync.client import connect

from nanochat.common import UserError
from nanochat.serve.errors import ApiError
from nanochat.serve.logs import JsonLines, TextLines, logger
from nanochat.serve.rate_limit import MAX_CLIENTS, RateLimiter
from nanochat.serve.replica import device_memory
from nanochat.serve.settings import Rate, Settings
from tests.serving import GREEDY, events, script, scripted_replica, served, user, wait_for


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the server logs, at every level, one JSON object per line."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonLines())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield written
    logger.removeHandler(handler)
    logger.setLevel(before)


def lines(log: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


# --- rate limit --------------------------------------------------------------------------------------


def test_rates():
    assert Rate.parse("30/minute") == Rate(30, 60) and Rate.parse("") is None
    for text in ("0/minute", "30", "30/week", "-1/hour", "1.5/second"):
        with pytest.raises(UserError, match="is not a rate"):
            Rate.parse(text)


def test_permissions_come_back_steadily():
    now = [0.0]
    limiter = RateLimiter(Rate(3, 60), lambda: now[0])

    def allowed(client: str) -> bool:
        try:
            limiter.spend(client)
        except ApiError as error:
            assert error.status_code == 429 and error.code == "rate_limited"
            assert error.headers is not None and 1 <= int(error.headers["Retry-After"]) <= 20
            return False
        return True

    assert [allowed("a") for _ in range(4)] == [True, True, True, False]
    assert allowed("b"), "clients do not share permissions"
    now[0] = 19.0
    assert not allowed("a")
    now[0] = 21.0
    assert [allowed("a"), allowed("a")] == [True, False]
    now[0] = 1e6
    assert [allowed("a") for _ in range(4)] == [True, True, True, False], "they do not pile up"


def test_a_crowd_of_clients_is_forgotten():
    limiter = RateLimiter(Rate(1, 60))
    for number in range(MAX_CLIENTS + 10):
        limiter.spend(str(number))
    assert len(limiter._buckets) == MAX_CLIENTS


def test_every_api_refuses_who_asks_too_often():
    keys = Settings(defaults=GREEDY, rate_limit=Rate(2, 3600), api_keys=("one", "two"))
    with served(lambda index: scripted_replica(script), keys) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="one", max_retries=0)
        for _ in range(2):
            client.chat.completions.create(model="default", messages=user("a"))
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="default", messages=user("a"))
        assert caught.value.code == "rate_limited"
        assert int(caught.value.response.headers["retry-after"]) > 1000
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        refused = server.http.post("/chat", json={"message": "a"}, headers=one)
        assert refused.status_code == 429 and refused.json()["code"] == "rate_limited"
        assert server.http.get("/stats", headers=one).status_code == 200, "looking is free"
        assert server.http.post("/chat", json={"message": "a"}, headers=two).status_code == 200
        with connect(f"{server.url.replace('http', 'ws')}/ws?token=two") as socket:
            socket.recv()
            kinds = []
            for _ in range(2):
                socket.send("a")
                while (frame := json.loads(socket.recv(5)))["type"] not in ("done", "error"):
                    pass
                kinds.append((frame["type"], frame.get("error", {}).get("code")))
            assert kinds == [("done", None), ("error", "rate_limited")]
        metrics = server.http.get("/metrics", headers=one).text
        assert 'nanochat_queue_rejections_total{reason="rate_limit"} 3.0' in metrics


# --- log and device ----------------------------------------------------------------------------------


def test_one_line_per_request_without_what_people_say(log: io.StringIO):
    with served(lambda index: scripted_replica(script), Settings(defaults=GREEDY)) as server:
        server.http.post("/chat", json={"message": "private"}, headers={"X-Request-ID": "r-1"})
        events(server, messages=user("private"))
        server.http.get("/nothing%0Aat%20all")
        server.http.get("/health")
        wait_for(lambda: len(lines(log)) == 4)
        # a stream's line comes after its last byte, perhaps beside the next request's
        paths = ["/chat", "/chat/completions", "other", "/health"]
        chat, stream, missing, health = sorted(lines(log), key=lambda line: paths.index(line["path"]))
        assert chat["event"] == "request" and chat["id"] == "r-1" and chat["path"] == "/chat"
        assert chat["status"] == 200 and chat["completion_tokens"] == 9 and chat["finish_reason"] == "stop"
        assert chat["total_ms"] >= chat["ttft_ms"] >= chat["queue_ms"] >= 0
        assert stream["path"] == "/chat/completions" and stream["completion_tokens"] == 9
        assert missing["path"] == "other" and missing["status"] == 404 and "worker" not in missing
        assert health["level"] == "DEBUG" and chat["level"] == "INFO"
        assert "private" not in log.getvalue() and "127.0.0.1" not in log.getvalue()


def test_text_lines():
    record = logging.LogRecord("x", logging.INFO, "", 0, "request", None, None)
    record.facts = {"id": "a", "worker": 0, "ttft_ms": None}
    assert TextLines().format(record).endswith(" INFO request id=a worker=0")


def test_device_and_build_are_told():
    assert set(device_memory("cpu").values()) == {None}
    with served(lambda index: scripted_replica(script), Settings(defaults=GREEDY)) as server:
        worker = server.http.get("/stats").json()["workers"][0]
        assert {"memory_allocated_bytes", "memory_reserved_bytes", "memory_total_bytes"} <= worker.keys()
        server.http.post("/chat", json={"message": "a"})
        text = server.http.get("/metrics").text
        assert 'model="nanochat-test"' in text and "nanochat_sessions 1.0" in text
        assert 'nanochat_kv_cache_bytes{worker="0"}' in text and "memory_kv_cache_bytes" in worker
        assert "process_resident_memory_bytes" in text and "python_info" in text
