"""The server under load, with clients that vanish, queues that fill and workers that fail."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import signal
import socket
import time

import httpx
import openai
import pytest
import torch

from nanochat.serve.settings import Settings
from tests.serving import (
    GREEDY,
    events,
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


def test_loop_answers_while_the_model_works_and_requests_share_its_steps():
    with (
        served(lambda index: scripted_replica(script), Settings(defaults=GREEDY), pause_s=0.005) as server,
        concurrent.futures.ThreadPoolExecutor(8) as threads,
    ):
        body = {"messages": user("long"), "max_tokens": 120, "stream": False}

        def ask(_: int) -> str:
            return httpx.post(f"{server.url}/chat/completions", json=body, timeout=60).json()["response"]

        begun = time.monotonic()
        alone = ask(0)
        single_s = time.monotonic() - begun
        steps = server.model.steps
        begun = time.monotonic()
        asked = [threads.submit(ask, index) for index in range(8)]
        wait_for(lambda: server.pool.workers[0].num_running == 8)
        delays = []
        while not all(answer.done() for answer in asked):
            at = time.monotonic()
            assert server.http.get("/health").json()["status"] == "ok"
            delays.append(time.monotonic() - at)
        together_s = time.monotonic() - begun
        assert [answer.result() for answer in asked] == [alone] * 8
        assert server.model.steps - steps < 3 * 121, "the requests were not batched"
        assert max(delays) < 0.2 and len(delays) > 3
        assert together_s < 5 * single_s


def test_clients_that_vanish_leave_no_work_behind():
    with served(
        lambda index: scripted_replica(script, max_batch=8),
        Settings(defaults=GREEDY, max_queue=200),
        pause_s=0.002,
    ) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({"messages": user("long"), "max_tokens": 400}).encode()
        head = f"POST /chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        request = (head + "Content-Type: application/json\r\n\r\n").encode() + body
        sockets = [socket.create_connection((host, int(port))) for _ in range(100)]
        for one in sockets:
            one.sendall(request)
        wait_for(lambda: server.pool.workers[0].num_running == 8 and len(server.pool.queue) > 50)
        for one in sockets:
            one.close()
        wait_for(lambda: idle(server))
        time.sleep(0.1)  # the last command is on its way to the model
        steps = server.model.steps
        time.sleep(0.1)
        assert server.model.steps == steps, "somebody still generates"
        assert server.http.post("/chat", json={"message": "hello"}).json()["response"] == "1:hello"


def test_full_queue_and_late_answers_are_refused_honestly():
    limits = Settings(defaults=GREEDY, max_queue=1, queue_timeout=0.3, request_timeout=1.0)
    with (
        served(lambda index: scripted_replica(script, max_batch=8), limits, pause_s=0.02) as server,
        concurrent.futures.ThreadPoolExecutor(12) as threads,
    ):
        body = {"messages": user("long"), "max_tokens": 400, "stream": False}
        post = [
            threads.submit(httpx.post, f"{server.url}/chat/completions", json=body, timeout=30)
            for _ in range(12)
        ]
        answers = [one.result() for one in post]
        codes = sorted((one.status_code, one.json()["code"]) for one in answers)
        assert codes.count((504, "request_timeout")) == 8
        assert set(codes[:-8]) == {(429, "queue_full"), (503, "queue_timeout")}
        assert all("retry-after" in one.headers for one in answers if one.status_code in (429, 503))


def test_a_failing_worker_reports_and_comes_back():
    with served(lambda index: scripted_replica(script), Settings(defaults=GREEDY)) as server:
        server.model.fail_next = True
        broken = server.http.post("/chat", json={"message": "a"})
        assert broken.status_code == 500 and broken.json()["code"] == "worker_failed"
        wait_for(lambda: server.pool.ready)
        server.model.fail_next = True
        got = events(server, messages=user("hello"))
        assert got[-2]["error"]["code"] == "worker_failed" and got[-1] == {"done": True}
        wait_for(lambda: server.pool.ready)
        assert server.http.post("/chat", json={"message": "hello"}).json()["response"] == "1:hello"
        assert server.http.get("/stats").json()["requests_failed"] == 2


def test_a_worker_that_dies_under_load_is_back_in_seconds():
    with (
        served(
            lambda index: scripted_replica(script, max_batch=16), Settings(defaults=GREEDY), pause_s=0.003
        ) as server,
        concurrent.futures.ThreadPoolExecutor(24) as threads,
    ):
        body = {"messages": user("long"), "max_tokens": 150, "events": "full"}

        def ask(_: int) -> tuple[str, str]:
            with httpx.stream("POST", f"{server.url}/chat/completions", json=body, timeout=60) as response:
                got = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
            assert got[-1]["done"] is True
            failed = [event["error"]["code"] for event in got if "error" in event]
            return "".join(event.get("token", "") for event in got), (failed or [got[-1]["finish_reason"]])[0]

        asked = [threads.submit(ask, index) for index in range(24)]
        wait_for(lambda: server.pool.workers[0].num_running == 16 and len(server.pool.queue) == 8)
        died = time.monotonic()
        server.signal(signal.SIGKILL)
        answers = [one.result() for one in asked]
        ended = [reason for _, reason in answers]
        assert ended.count("worker_failed") == 16 and ended.count("length") == 8
        whole = ("word " * 200)[:150]
        assert all(text == whole for text, reason in answers if reason == "length")
        assert all(whole.startswith(text) for text, _ in answers)
        assert server.http.post("/chat", json={"message": "hello"}).json()["response"] == "1:hello"
        assert time.monotonic() - died < 10


def test_not_ready_while_loading():
    go = multiprocessing.get_context("fork").Event()

    def load(index: int):
        if index == 1:
            go.wait(20)
        return scripted_replica(script)

    with served(load, num_workers=2) as server:
        states = [worker["state"] for worker in server.http.get("/stats").json()["workers"]]
        assert states == ["idle", "loading"]
        go.set()
        wait_for(lambda: all(worker.usable for worker in server.pool.workers))


def test_api_keys_guard_everything_but_the_page():
    with served(lambda index: scripted_replica(script), Settings(api_keys=("s3cret", "other"))) as server:
        for path in ("/", "/health", "/ready", "/config", "/static/app.js"):
            assert server.http.get(path).status_code == 200, path
        for path in ("/stats", "/v1/models", "/sessions", "/metrics"):
            assert server.http.get(path).status_code == 401, path
        headers = {"Authorization": "Bearer s3cret"}
        session = server.http.post("/chat", json={"message": "x"}, headers=headers).json()["session_id"]
        other = {"Authorization": "Bearer other"}
        assert server.http.get(f"/sessions/{session}", headers=headers).status_code == 200
        assert server.http.get(f"/sessions/{session}", headers=other).status_code == 404
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
