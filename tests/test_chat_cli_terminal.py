"""`python -m scripts.chat_cli` in a real pseudo-terminal, talking to a real server."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from nanochat.live_markdown import split_done, tail
from nanochat.serve.settings import Settings
from tests.serving import GREEDY, Served, idle, scripted_replica, served, wait_for
from tests.serving import script as plain_script

ROOT = Path(__file__).parents[1]
# A session leader that opens a terminal gets it as its controlling one, so that Ctrl-C is a signal.
START = (
    "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR));"
    "os.execv(sys.executable, [sys.executable, '-m', 'scripts.chat_cli', *sys.argv[1:]])"
)
MARKDOWN = "# Title\n\nSome **bold** text.\n\n- one\n- two\n\n```python\nprint(1)\n```\n\nThe end."


def script(questions: list[str]) -> str:
    if questions[-1] == "markdown":
        return MARKDOWN
    if questions[-1] == "numbers":
        return " ".join(f"n{i}" for i in range(100, 200))
    if questions[-1] == "evil":
        return "\x1b[31mred\x1b]0;title\x07 \u202eback\n\n\ue000not dim\ue001"
    return plain_script(questions)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    torch.set_num_threads(1)
    with served(lambda index: scripted_replica(script, context=2048), Settings(defaults=GREEDY)) as running:
        yield running


class Terminal:
    """The program in a terminal of 80 x 24, and a person who types."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.resize(80)
        environment = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        for name in ("NO_COLOR", "COLUMNS", "LINES"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments],
            stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.raw, self.read = b"", 0

    def resize(self, columns: int) -> None:
        """As a window does: the kernel tells the program."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def read_until(self, text: str, timeout_s: float = 120.0) -> str:
        """What appeared since the last call, up to and with a text; escape sequences left out."""
        end = time.monotonic() + timeout_s
        while (found := self.plain.find(text, self.read)) < 0:
            assert time.monotonic() < end, f"{text!r} did not appear in {self.plain[self.read :]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.raw += os.read(self.master, 65536)
        begin, self.read = self.read, found + len(text)
        return self.plain[begin : self.read]

    def ask(self, keys: str, answer: str) -> str:
        """Type, wait for a text in the answer and for the next prompt; what appeared."""
        self.type(keys)
        return self.read_until(answer) + self.read_until("User:")

    @property
    def plain(self) -> str:
        return re.sub(
            r"\x1b(\[[0-?]*[ -/]*[@-~]|\].*?\x07|[@-Z\\^_])", "", self.raw.decode("utf-8", "ignore")
        )

    def leave(self, keys: str) -> int:
        self.type(keys)
        end = time.monotonic() + 30
        while self.process.poll() is None:  # a full terminal would hold the program back
            assert time.monotonic() < end, "the program did not end"
            if select.select([self.master], [], [], 0.1)[0]:
                with suppress(OSError):  # the other end is closed
                    os.read(self.master, 65536)
        return self.process.returncode


@contextmanager
def terminal(server: Served, *arguments: str) -> Iterator[Terminal]:
    server.model.pause_s = 0.0
    running = Terminal("--url", server.url, "-t", "0", *arguments)
    try:
        running.read_until("User:")
        yield running
    finally:
        running.process.kill()
        running.process.wait()
        os.close(running.master)


def test_editing_history_multi_byte_and_commands(server: Served, tmp_path):
    history = tmp_path / "typed"
    with terminal(server, "--history", str(history)) as screen:
        screen.ask("helxo\x1b[D\x7fl\r", "1:hello")  # left, backspace
        screen.ask("\x1b[A\r", "2:hello")  # up
        seen = screen.ask("emoji\r", "\u00e4\u6f22\U0001f600!")
        assert "\ufffd" not in seen
        screen.ask("\u6f22\u5b57\r", "4:\u6f22\u5b57")
        screen.ask("/undo\r", "taken back: \u6f22\u5b57")
        screen.ask("/tokens\r", "of 2048 tokens")
        screen.ask("/nonsense\r", "is not a command")
        assert screen.leave("/quit\r") == 0
    with terminal(server, "--history", str(history)) as screen:
        screen.ask("\x1b[A" * 5 + "\r", "1:\u6f22\u5b57")  # the fifth line back; the first is /quit


@pytest.mark.parametrize("history", [".", "none/typed"])
def test_a_history_that_cannot_be_kept_is_one_line(tmp_path, history: str):
    screen = Terminal("--url=http://127.0.0.1:9", f"--history={tmp_path / history}")
    try:
        seen = screen.read_until("in a folder that exists")
        assert seen.startswith(f"error: --history={tmp_path}") and screen.leave("") == 2
    finally:
        screen.process.kill()
        os.close(screen.master)


def test_ctrl_c_stops_the_answer_and_not_the_program(server: Served):
    with terminal(server) as screen:
        server.model.pause_s = 0.02
        screen.type("long\r")
        screen.read_until("word word")
        screen.type("\x03")
        screen.read_until("User:")
        wait_for(lambda: idle(server))
        assert screen.process.poll() is None
        server.model.pause_s = 0.0
        screen.ask("again\r", "2:again")
        screen.ask("\x03", "Ctrl-C again or /quit leaves")
        assert screen.leave("\x03") == 0


def test_markdown_tools_and_hostile_text_at_every_width(server: Served):
    with terminal(server) as screen:
        seen = screen.ask("markdown\r", "The end.")
        assert b"\x1b[1mbold" in screen.raw and "\u2022 one" in seen and "print(1)" in seen
        screen.resize(30)
        screen.ask("sum\r", "85]85.")
        assert b"\x1b[2m[27+58 = 85]" in screen.raw
        begin = len(screen.raw)
        screen.ask("evil\r", "not dim")
        raw = screen.raw[begin:]
        assert b"\x1b[31mred" not in raw and b"\x1b]0;" not in raw and "\u202e".encode() not in raw
        assert b"[31mred" in raw and b"\x1b[2m" not in raw
        assert screen.leave("\x04") == 0  # Ctrl-D


def test_line_editing_as_in_a_shell(server: Served):
    with terminal(server) as screen:
        screen.ask("world\x01hello \x05!\r", "1:hello world!")  # start and end of the line
        screen.ask("one two\x17three\r", "2:one three")  # a word back
        screen.ask("\u6f22\u5b57\U0001f600\x7f\x7f\u00e9\r", "3:\u6f22\u00e9")  # whole characters
        screen.ask("gone\x15kept\r", "4:kept")
        screen.ask("\x12world\r\r", "5:hello world!")  # search in the history
        screen.type("/tem\t")
        screen.read_until("perature")
        screen.ask("\r", "temperature: 0")
        screen.ask("\x1b[200~two\rlines\x1b[201~\r", "6:two")  # pasted: one message
        screen.ask('"""three\rmore\rlines"""\r', "7:three")
        screen.ask("ends \\\rhere\r", "8:ends")
        assert screen.leave("exit\r") == 0


def test_resizing_while_an_answer_is_written(server: Served):
    with terminal(server) as screen:
        server.model.pause_s = 0.02
        screen.type("numbers\r")
        for columns in (200, 12, 60, 3, 80):
            screen.read_until("n1")
            screen.resize(columns)
            time.sleep(0.15)
        server.model.pause_s = 0.0
        seen = screen.read_until("User:")
        final = seen[seen.rindex("n100 ") :].split()
        assert final[:100] == [f"n{i}" for i in range(100, 200)], (
            "the answer as it stays on the screen is whole"
        )
        screen.ask("again\r", "2:again")
        assert screen.leave("/quit\r") == 0


# --- without a terminal --------------------------------------------------------------------------------


def cli(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scripts.chat_cli", *arguments],
        input=stdin, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
    )  # fmt: skip


def test_pipes_with_a_server(server: Served):
    result = cli("--url", server.url, "-t", "0", "--json", "--seed", "5", stdin="sum\n")
    answer = json.loads(result.stdout)
    assert result.returncode == 0 and answer["response"] == "27 + 58 = 85." and answer["seed"] == 5
    assert [part["type"] for part in answer["parts"]] == ["text", "python", "python_output", "text"]
    assert answer["usage"]["prompt_tokens"] == 1 + 5 + 1 and answer["finish_reason"] == "stop"
    assert result.stderr == f"model: nanochat-test step 7 at {server.url}\n"
    server.model.fail_next = True
    result = cli("--url", server.url, "-p", "hello")
    assert result.returncode == 2 and "the model failed" in result.stderr and result.stdout == ""
    wait_for(lambda: server.pool.ready)


def test_a_reader_that_has_enough(server: Served):
    command = f"{sys.executable} -m scripts.chat_cli --url {server.url} -t 0 -p long | head -c 4"
    server.model.pause_s = 0.002
    result = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 141 and result.stdout == "word" and "Traceback" not in result.stderr
    wait_for(lambda: idle(server))  # nobody goes on writing
    server.model.pause_s = 0.0


def test_ctrl_c_ends_a_single_answer_with_what_there_is(server: Served):
    server.model.pause_s = 0.02
    command = [
        sys.executable,
        "-m",
        "scripts.chat_cli",
        "--url",
        server.url,
        "-t",
        "0",
        "-p",
        "long",
        "--json",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        wait_for(lambda: server.pool.workers[0].num_running == 1, 60)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    answer = json.loads(out)
    assert process.returncode == 130 and answer["finish_reason"] == "cancelled"
    assert "word word ".startswith(answer["response"][:10]) and len(answer["response"]) < 900
    wait_for(lambda: idle(server))
    server.model.pause_s = 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--url", "http://127.0.0.1:9"), "no server at http://127.0.0.1:9: Connection refused"),
        (("--url", "nonsense"), "no server at nonsense: this is no address such as http://127.0.0.1:8000;"),
        (("--url", "127.0.0.1:8000"), "this is no address such as http://127.0.0.1:8000;"),
        (("--url", "SERVER", f"--seed={2**70}"), "refuses (422): seed: Input should be less than"),
        (("--url", "SERVER", "-i", "sft"), "leave out --source"),
        (("--url", "SERVER", "-t", "9"), "temperature must be between"),
    ],
)
def test_mistakes_with_a_server_are_one_line(server: Served, arguments: tuple[str, ...], message: str):
    result = cli(*(server.url if one == "SERVER" else one for one in arguments), "-p", "x")
    assert result.returncode == 2 and message in result.stderr and result.stdout == ""
    assert "Traceback" not in result.stderr


# --- blocks of Markdown --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "done"),
    [
        ("one\n", ""), ("one\n\n", ""), ("one\n\ntwo", "one\n\n"), ("- a\n\n- b\n\n  c", ""),
        ("- a\n\nb", "- a\n\n"), ("```\na\n\nb", ""), ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n"),
        ("1. a\n\n2. b", ""), ("~~~\n```\n\nx\n", ""),
    ],
)  # fmt: skip
def test_blocks_that_are_done(source: str, done: str):
    assert split_done(source) == (done, source[len(done) :])


def test_the_end_of_a_tall_block():
    code = "```python\n" + "".join(f"line {i}\n" for i in range(100))
    assert tail(code, 3, 80) == "```\nline 97\nline 98\nline 99\n"
    assert tail("short", 3, 80) == "short" and len(tail("x" * 10**6, 3, 80)) == 240
