"""What users get wrong: one clear line on stderr, a non-zero exit, nothing damaged."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.training import BASE_FLAGS, ROOT, run_here


def call(module: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_one_line(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ")
    for part in parts:
        assert part in message, message


FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in BASE_FLAGS.items()]


def test_no_data(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    assert_one_line(call("scripts.tok_train"), "tinyworld")


def test_no_tokenizer(tiny_run):
    for path in (tiny_run / "tokenizer").iterdir():
        path.unlink()
    assert_one_line(call("scripts.base_train", *FLAGS), "tok_train")


def test_unknown_flag(tiny_run):
    assert_one_line(call("scripts.base_train", "--dept=4"), "did you mean --depth?")


def test_batch_that_does_not_divide(tiny_run):
    assert_one_line(call("scripts.base_train", *FLAGS, "--total-batch-size=500"), "not a multiple", "try ")
    assert not list((tiny_run / "base_checkpoints").glob("*/model_*"))


@pytest.mark.parametrize("script", ["mid_train", "chat_sft", "chat_rl"])
def test_no_checkpoint(tiny_run, script):
    assert_one_line(call(f"scripts.{script}", "--device-type=cpu"), "train that stage first")


@pytest.mark.parametrize("arguments", [["scripts.chat_cli", "-p", "hello"], ["scripts.chat_web", "-p", "0"], ["scripts.chat_eval", "-i", "sft"]])  # fmt: skip
def test_nothing_to_talk_to(tiny_run, arguments):
    assert_one_line(call(*arguments), "checkpoint")


def test_damaged_checkpoint(tiny_run):
    run_here("base_train", num_iterations=1, eval_every=-1)
    path = tiny_run / "base_checkpoints" / "t" / "model_000001.pt"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert_one_line(call("scripts.chat_cli", "-i", "base", "-p", "hello"), "damaged")


def test_port_in_use(tiny_run):
    run_here("base_train", num_iterations=1, eval_every=-1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_one_line(call("scripts.chat_web", "-i", "base", "-p", str(port)), str(port), "in use")


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk needs root on Linux"
)
def test_full_disk(tiny_run):
    folder = tiny_run / "base_checkpoints"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this system does not allow mounting")
    try:
        done = call("scripts.base_train", *FLAGS)
        assert_one_line(done, "No space left")
        assert not list(folder.glob("*/meta_*"))  # no half checkpoint that counts
        assert not list(folder.glob("*/.*tmp"))
    finally:
        subprocess.run(["umount", str(folder)], check=True)
