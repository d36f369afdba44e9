"""WS /ws: asking, stopping, reconnecting, and frames that make no sense."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from nanochat.serve.settings import Settings
from tests.serving import GREEDY, Served, idle, script, scripted_replica, served, wait_for


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    torch.set_num_threads(1)
    with served(lambda index: scripted_replica(script), Settings(defaults=GREEDY)) as running:
        yield running


def address(server: Served, query: str = "") -> str:
    return server.url.replace("http", "ws") + "/ws" + query


def receive(socket: ClientConnection) -> dict:
    return json.loads(socket.recv(60))


def answer(socket: ClientConnection) -> list[dict]:
    """Frames up to the end of an answer."""
    frames = [receive(socket)]
    while frames[-1]["type"] not in ("done", "error"):
        frames.append(receive(socket))
    return frames


def test_plain_text_is_a_message_and_the_connection_remembers(server: Served):
    with connect(address(server)) as socket:
        hello = receive(socket)
        assert (
            hello["type"] == "hello" and hello["model"] == "nanochat-test" and hello["context_length"] == 512
        )
        socket.send("a")
        frames = answer(socket)
        assert frames[0]["type"] == "start"
        assert "".join(f["token"] for f in frames if f["type"] == "token") == "1:a"
        assert frames[-1]["response"] == "1:a" and frames[-1]["done"] is True
        socket.send(json.dumps({"message": "sum", "id": "mine"}))
        frames = answer(socket)
        assert [(f["phase"], f["text"]) for f in frames if f["type"] == "tool"] == [
            ("call", "27+58"),
            ("output", "85"),
        ]
        assert {f["id"] for f in frames} == {"mine"}
        socket.send(json.dumps({"type": "edit", "index": 2, "message": "b"}))
        assert answer(socket)[-1]["response"] == "2:b"
        socket.send(json.dumps({"type": "regenerate"}))
        assert answer(socket)[-1]["response"] == "2:b"
    with connect(address(server, f"?session_id={hello['session_id']}")) as socket:
        assert receive(socket)["session_id"] == hello["session_id"]
        socket.send("c")
        assert answer(socket)[-1]["response"] == "3:c"
        socket.send(json.dumps({"type": "reset"}))
        socket.send("d")
        assert answer(socket)[-1]["response"] == "1:d"


def test_stateless_answers_leave_nothing_behind_and_scores_come_if_asked(server: Served):
    with connect(address(server)) as socket:
        session = receive(socket)["session_id"]
        body = {"messages": [{"role": "user", "content": "ab"}], "logprobs": 2}
        socket.send(json.dumps({**body, "stateless": True}))
        scores = [score for frame in answer(socket) for score in frame.get("logprobs", [])]
        assert [score["token"] for score in scores][:4] == ["1", ":", "a", "b"]
        assert all(len(score["top_logprobs"]) == 2 for score in scores)
        assert server.http.get(f"/sessions/{session}").json()["messages"] == []
        socket.send("c")
        assert answer(socket)[-1]["response"] == "1:c"


def test_set_stop_ping_and_busy(server: Served):
    server.model.pause_s = 0.01
    try:
        with connect(address(server)) as socket:
            receive(socket)
            socket.send(json.dumps({"type": "set", "max_tokens": 2}))
            socket.send("hello")
            assert answer(socket)[-1]["finish_reason"] == "length"
            socket.send(json.dumps({"type": "ping"}))
            assert receive(socket) == {"type": "pong"}
            socket.send(json.dumps({"message": "long", "max_tokens": 400}))
            assert receive(socket)["type"] == "start"
            socket.send("too early")
            frames = [receive(socket) for _ in range(3)]
            assert "busy" in [f["error"]["code"] for f in frames if f["type"] == "error"]
            socket.send(json.dumps({"type": "stop"}))
            assert answer(socket)[-1]["finish_reason"] == "cancelled"
    finally:
        server.model.pause_s = 0.0


def test_a_client_that_leaves_stops_its_answer(server: Served):
    server.model.pause_s = 0.01
    try:
        with connect(address(server)) as socket:
            session = receive(socket)["session_id"]
            socket.send("long")
            while receive(socket)["type"] != "token":
                pass
        wait_for(lambda: idle(server), 3)
    finally:
        server.model.pause_s = 0.0
    wait_for(lambda: server.http.get(f"/sessions/{session}").json()["messages"])
    stored = server.http.get(f"/sessions/{session}").json()["messages"]
    assert stored[1]["cancelled"] is True and stored[1]["content"][0]["text"].startswith("w")


def test_oversized_frames_and_foreign_pages_are_turned_away(server: Served):
    with connect(address(server)) as socket, pytest.raises(ConnectionClosed) as caught:
        socket.send("x" * (1 << 17))
        while True:
            socket.recv(60)
    assert caught.value.rcvd is None or caught.value.rcvd.code == 1009
    with pytest.raises(InvalidStatus):
        connect(address(server), origin="http://evil.example")


def test_keys(server: Served):
    with served(
        lambda index: scripted_replica(script), Settings(defaults=GREEDY, api_keys=("k",))
    ) as guarded:
        with connect(address(guarded, "?token=k")) as socket:
            assert receive(socket)["type"] == "hello"
        with connect(address(guarded)) as socket:
            socket.send(json.dumps({"type": "auth", "token": "k"}))
            assert receive(socket)["type"] == "hello"
        with connect(address(guarded)) as socket, pytest.raises(ConnectionClosed) as caught:
            socket.send("let me in")
            socket.recv(60)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1008


def test_a_frame_of_bytes_is_read_as_text(server: Served):
    with connect(address(server)) as socket:
        receive(socket)
        socket.send(b"a\xff")
        assert answer(socket)[-1]["response"] == "1:a\ufffd"
        socket.send(json.dumps({"message": "b", "session_id": "\ud800"}))
        assert answer(socket)[-1]["error"]["code"] == "session_not_found"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(
    [
        "message",
        "messages",
        "session_id",
        "id",
        "index",
        "temperature",
        "top_k",
        "max_tokens",
        "seed",
        "stop",
        "system",
    ]
)
KINDS = st.sampled_from(
    ["chat", "stop", "set", "reset", "regenerate", "edit", "ping", "auth", "nonsense", 5, None]
)
FRAMES = st.builds(
    lambda kind, rest: {"type": kind, **rest}, KINDS, st.dictionaries(NAMES, VALUES, max_size=4)
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(FRAMES | VALUES | st.binary(max_size=20) | st.just(b"[" * 9999), max_size=5))
def test_no_frame_breaks_a_connection_or_a_worker(server: Served, frames: list):
    with connect(address(server)) as socket:
        receive(socket)
        for frame in frames:
            socket.send(frame if isinstance(frame, bytes) else json.dumps(frame))
        socket.send(json.dumps({"type": "stop"}))
        socket.send(json.dumps({"type": "ping"}))
        while receive(socket)["type"] != "pong":
            pass
    wait_for(lambda: idle(server))
    assert server.pool.workers[0].num_failed == 0
