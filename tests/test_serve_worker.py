"""The process of a model: crashes, hangs, repeated crashes, and readers slower than it."""

from __future__ import annotations

import concurrent.futures
import json
import pickle
import signal
import socket
import subprocess
import sys

import httpx
import pytest
import torch

from nanochat.serve.settings import Settings
from nanochat.serve.worker import MAX_RELOADS
from tests.serving import (
    GREEDY,
    Served,
    byte_tokenizer,
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


def ask(server: Served, message: str = "hello", **body) -> httpx.Response:
    return server.http.post("/chat", json={"message": message, "stateless": True, **body})


def test_the_server_itself_does_without_torch():
    code = (
        "import sys, scripts.chat_web, nanochat.serve.app, nanochat.serve.launcher, nanochat.serve.loading;"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_tokenizer_goes_from_process_to_process():
    there = pickle.loads(pickle.dumps(byte_tokenizer()))
    assert there.encode("a\u6f22") == byte_tokenizer().encode("a\u6f22")
    assert there.get_bos_token_id() == 256 and there.encode_special("<|output_end|>") == 264


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_an_idle_process_that_dies_is_replaced_unseen(number: signal.Signals):
    with served(lambda index: scripted_replica(script), Settings(defaults=GREEDY)) as server:
        server.signal(number)
        wait_for(lambda: not server.pool.ready or server.pool.workers[0]._reloads)
        assert ask(server).json()["response"] == "1:hello", "requests wait while it loads"
        assert server.http.get("/health").json()["failed_workers"] == 0


def test_a_process_that_hangs_is_replaced():
    with served(
        lambda index: scripted_replica(script), Settings(defaults=GREEDY, request_timeout=2.0), pause_s=0.01
    ) as server:
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            asked = threads.submit(ask, server, "long", max_tokens=400)
            wait_for(lambda: server.model.steps > 5)
            server.signal(signal.SIGSTOP)
            refused = asked.result()
            assert refused.status_code == 504 and refused.json()["code"] == "request_timeout"
        wait_for(lambda: server.pool.workers[0]._reloads == 1)
        assert ask(server).json()["response"] == "1:hello"


def test_a_worker_that_dies_again_and_again_is_given_up():
    with served(lambda index: scripted_replica(script), Settings(defaults=GREEDY)) as server:
        for _ in range(MAX_RELOADS + 1):
            server.model.fail_next = True
            lost = ask(server)
            assert lost.status_code == 500 and lost.json()["code"] == "worker_failed"
            assert lost.headers["x-should-retry"] == "false"
        wait_for(lambda: server.pool.workers[0].gone)
        assert server.http.get("/health").json()["status"] == "failed"
        assert server.http.get("/ready").status_code == 503
        assert ask(server).status_code == 503 and ask(server).json()["code"] == "not_ready"


def test_a_reload_cuts_nothing():
    """Answers that run are completed by the old process, those that wait are given by the new one."""
    with (
        served(
            lambda index: scripted_replica(script, max_batch=8), Settings(defaults=GREEDY), pause_s=0.005
        ) as server,
        concurrent.futures.ThreadPoolExecutor(12) as threads,
    ):
        asked = [threads.submit(ask, server, "long", max_tokens=100) for _ in range(12)]
        wait_for(lambda: server.pool.workers[0].num_running == 8 and len(server.pool.queue) == 4)
        old = server.pool.workers[0]._process
        server.pool._tasks[0].get_loop().call_soon_threadsafe(server.pool.reload)
        assert all(one.result().json()["usage"]["completion_tokens"] == 100 for one in asked)
        assert old is not server.pool.workers[0]._process and not server.pool.workers[0].num_failed


def test_two_processes_work_side_by_side_and_one_may_die():
    with (
        served(lambda index: scripted_replica(script), Settings(defaults=GREEDY), 2, pause_s=0.01) as server,
        concurrent.futures.ThreadPoolExecutor(2) as threads,
    ):
        wait_for(lambda: all(worker.usable for worker in server.pool.workers))
        asked = [threads.submit(ask, server, "long", max_tokens=100) for _ in range(2)]
        wait_for(lambda: all(worker.num_running == 1 for worker in server.pool.workers))
        server.signal(signal.SIGKILL, worker=1)
        assert sorted(one.result().status_code for one in asked) == [200, 500]
        assert ask(server).json()["response"] == "1:hello"


def test_what_the_engine_refuses_is_the_clients_mistake():
    with served(lambda index: scripted_replica(script), Settings(defaults=GREEDY)) as server:
        body = {"model": "default", "messages": user("a"), "logit_bias": {"99999": 1}, "n": 3}
        refused = server.http.post("/v1/chat/completions", json=body)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "invalid_value"
        assert "token ids" in refused.json()["error"]["message"]
        assert ask(server).json()["response"] == "1:hello" and idle(server)


def test_a_slow_reader_slows_nobody_else():
    def endless(questions: list[str]) -> str:
        return "word " * 300 if questions[-1] == "long" else script(questions)

    with served(lambda index: scripted_replica(endless, context=2048), Settings(defaults=GREEDY)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({"messages": user("long"), "max_tokens": 1500, "logprobs": 20}).encode()
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((host, int(port)))
            head = f"POST /chat/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n"
            slow.sendall((head + "Content-Type: application/json\r\n\r\n").encode() + body)
            wait_for(lambda: server.model.steps > 20)
            worker, num_others = server.pool.workers[0], 0
            while worker.num_running:
                assert ask(server, max_tokens=3).json()["response"] == "1:h"
                num_others += 1
            assert num_others > 3, "others were not answered while one client did not read"
            received = b""
            while chunk := slow.recv(1 << 16):
                received += chunk
        lines = [line for line in received.decode().splitlines() if line.startswith("data: ")]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert events[-1]["done"] and "".join(e.get("token", "") for e in events) == "word " * 300
        assert len(events) < 1500, "text that waited was not joined"
        assert sum(len(e.get("logprobs", ())) for e in events) == 1500
