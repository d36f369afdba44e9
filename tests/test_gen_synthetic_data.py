"""Identity conversations: valid for the task that reads them, varied, reproducible; a faulty endpoint; resuming."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dev import gen_synthetic_data as gen
from dev.persona_templates import TOPICS, Identity, from_templates, styled
from nanochat.common import UserError
from tasks.customjson import CustomJSON


def generate(tmp_path: Path, **options) -> list:
    gen.main(gen.Config(output=str(tmp_path / "out.jsonl"), **options))
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]


# --- templates ---------------------------------------------------------------------------------------


def test_a_thousand_conversations_that_the_task_reads(tmp_path):
    lines = generate(tmp_path, num=1000)
    assert len(lines) > 900, "too many alike"
    task = CustomJSON(tmp_path / "out.jsonl")
    assert len(task) == len(lines) and task[0]["messages"] == lines[0]
    text = json.dumps(lines)
    assert "{" + "name}" not in text and "nanochat" in text
    assert not (tmp_path / "out.jsonl.partial").exists()
    openings = Counter(line[0]["content"] for line in lines)
    assert openings.most_common(1)[0][1] < 20
    assert {2, 4, 6, 8} <= {len(line) for line in lines}


def test_the_same_index_gives_the_same_conversation_whatever_the_number(tmp_path):
    few, many = generate(tmp_path, num=20), generate(tmp_path, num=60)
    assert many[: len(few)] == few


def test_every_template_fills_in_and_is_a_dialogue():
    identity = Identity(name="Zed", facts=("I know one fact.",))
    seen = set()
    for index in range(400):
        messages, dimensions = from_templates(index, identity)
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(m["content"] and "{" not in m["content"] for m in messages)
        seen |= set(dimensions["topics"].split(", "))
    assert seen == set(TOPICS)


def test_metadata_lines_are_read_too(tmp_path):
    lines = generate(tmp_path, num=5, save_metadata=True)
    assert lines[0]["metadata"]["topics"]
    assert CustomJSON(tmp_path / "out.jsonl")[0]["messages"] == lines[0]["messages"]


def test_ascii_only_and_an_identity_of_ones_own(tmp_path):
    path = tmp_path / "identity.json"
    path.write_text(json.dumps({"name": "Ada", "creator": "Jo", "facts": ["I like tea."]}))
    lines = generate(tmp_path, num=200, ascii_only=True, identity=str(path))
    text = json.dumps(lines, ensure_ascii=False)
    assert (
        text.isascii()
        and "Ada" in text
        and "I like tea." in text
        and "nanochat" not in text.replace("/nanochat", "")
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [('{"nam": "x"}', "unknown nam; an identity has"), ("[1]", "no object"), ("{", "cannot read"),
     ('{"facts": []}', "list of sentences"), ('{"name": 3}', "all other fields text")],
)  # fmt: skip
def test_a_bad_identity_is_one_clear_line(tmp_path, content, problem):
    path = tmp_path / "identity.json"
    path.write_text(content)
    with pytest.raises(UserError, match=problem):
        generate(tmp_path, identity=str(path))


def test_nearly_equal_conversations_are_dropped():
    words = [f"w{i}" for i in range(60)]
    nearly, other = [*words[:-1], "different"], list(reversed(words))
    made = [([{"role": "user", "content": " ".join(w)}], {}) for w in (words, nearly, other, words)]
    assert [m[0][0]["content"].split()[0] for m in gen.select(made, False)] == ["w0", "w59"]


def test_styles():
    rng = random.Random(0)
    assert styled("What IS it?", "lower", rng) == "what is it?"
    assert len(styled("Who are you?", "typo", rng)) == len("Who are you?") - 1
    assert styled("Hi", "typo", rng) == "Hi"


# --- an endpoint -------------------------------------------------------------------------------------


class Endpoint(ThreadingHTTPServer):
    """Answers with a conversation, after the faults that are queued."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[str] = []
        self.requests: list[dict] = []
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        pass  # dropped connections are part of the tests


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, format, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.keys.add(self.headers["Authorization"])
            fault = self.server.faults.pop(0) if self.server.faults else ""
            number = len(self.server.requests)
        if fault == "drop":
            self.connection.close()
            return
        status = int(fault) if fault.isdigit() else 200
        messages = [
            {"role": "user", "content": f"Question {number} {body['messages'][0]['content'][-900:-400]}"},
            {"role": "assistant", "content": "" if fault == "empty" else f"Answer {number}"},
        ]
        content = json.dumps({"messages": messages})
        content = {"fence": f"Here:\n```json\n{content}\n```", "prose": "I would rather not."}.get(
            fault, content
        )
        answer = {
            "choices": [{"message": {"role": "assistant", "content": content}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10},
        }
        data = json.dumps(answer).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0.05")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(gen.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("TEST_KEY", "secret")
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(tmp_path: Path, endpoint: Endpoint, **options) -> list:
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    defaults = {"num": 4, "workers": 1, "attempts": 4}
    return generate(tmp_path, base_url=url, model="m", api_key_env="TEST_KEY", **{**defaults, **options})


def test_a_model_writes_them_and_faults_are_tried_again(tmp_path, endpoint, capsys):
    endpoint.faults = ["429", "500", "drop", "", "fence", "prose", "empty", ""]
    lines = ask(tmp_path, endpoint, usd_per_million_in=1.0)
    assert [line[1]["content"] for line in lines] == ["Answer 4", "Answer 5", "Answer 8", "Answer 9"]
    assert endpoint.keys == {"Bearer secret"}
    assert endpoint.requests[0]["response_format"]["json_schema"]["strict"] is True
    assert "nanochat" in endpoint.requests[0]["messages"][0]["content"]
    # answers that could not be used were paid for, too
    assert "600 prompt tokens, 60 written tokens, about $0.00" in capsys.readouterr().out


def test_what_failed_is_reported_and_made_by_the_next_run(tmp_path, endpoint):
    endpoint.faults = ["", "500", "500", "500", "500"]
    with pytest.raises(UserError, match="1 of 4 requests failed; run again with --resume"):
        ask(tmp_path, endpoint)
    partial = tmp_path / "out.jsonl.partial"
    assert [json.loads(line)["index"] for line in partial.read_text().splitlines()] == [0, 2, 3]
    with open(partial, "a") as file:
        file.write('{"index": 1, "mess')  # the run was killed while it wrote
    before = len(endpoint.requests)
    lines = ask(tmp_path, endpoint, resume=True)
    assert len(endpoint.requests) == before + 1 and len(lines) == 4
    assert [line[1]["content"] for line in lines] == ["Answer 1", "Answer 8", "Answer 6", "Answer 7"]
    assert not partial.exists()


def test_the_order_does_not_depend_on_who_is_first(tmp_path, endpoint):
    ask(tmp_path, endpoint, num=12, workers=4, save_metadata=True)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["metadata"] for line in lines] == [from_templates(i, Identity())[1] for i in range(12)]


def test_what_no_retry_can_mend_is_an_error(tmp_path, endpoint, monkeypatch):
    endpoint.faults = ["401"] * 2
    with pytest.raises(UserError, match="no conversation was made; 1 of 1 failed"):
        ask(tmp_path, endpoint, num=1)
    assert len(endpoint.requests) == 1
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(UserError, match="cannot write /dev/null: it is not a file"):
        gen.main(gen.Config(num=1, output="/dev/null"))
    with pytest.raises(UserError, match="TEST_KEY is not set"):
        ask(tmp_path, endpoint)
    with pytest.raises(UserError, match="needs --model"):
        generate(tmp_path, base_url="http://127.0.0.1:1/v1")
    with pytest.raises(UserError, match="does not exist"):
        generate(tmp_path, base_url="http://127.0.0.1:1/v1", model="m", knowledge=str(tmp_path / "none"))
