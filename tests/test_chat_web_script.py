"""`python -m scripts.chat_web` as people start it: a checkpoint served, and what can be wrong at start."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import psutil
import pytest
import torch

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.gpt import GPT, GPTConfig
from scripts.chat_web import Config, settings_of
from tests.serving import byte_tokenizer


def run_script(tmp_path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "scripts.chat_web", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


def test_a_taken_port_is_one_clear_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run_script(tmp_path, f"--port={taken.getsockname()[1]}")
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(
        r"error: cannot listen on 127\.0\.0\.1:\d+: .*; choose another --port or --host\n", result.stderr
    )


def test_a_missing_checkpoint_is_one_clear_line(tmp_path):
    result = run_script(tmp_path, "--port=0", "--device-type=cpu")
    assert result.returncode == 2
    assert result.stderr.startswith("error: no checkpoint below ") and result.stderr.count("\n") == 1


def test_more_replicas_than_gpus_are_one_clear_line(tmp_path):
    result = run_script(tmp_path, "--port=0", "--device-type=cpu", "--num-gpus=3")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: --num-gpus=3, but"), result.stderr


@contextmanager
def started(tmp_path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The script as people start it, over a small random model, and its address."""
    tokenizer = byte_tokenizer()
    sizes = {"sequence_len": 64, "vocab_size": tokenizer.get_vocab_size(), "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)  # other weights may end their answer at once
    model = GPT(GPTConfig.modern(**sizes, n_kv_head=2, n_embd=64))
    model.init_weights()
    save_checkpoint(tmp_path / "chatsft_checkpoints" / "d2", 3, model, {}, tokenizer=tokenizer)
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "scripts.chat_web", "--port=0", "--device-type=cpu", "-t", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("nanochat-sft-d2, step 3, on cpu")
            yield process, process.stdout.readline().split()[1]
        finally:
            process.kill()


def model_process(process: subprocess.Popen[str]) -> psutil.Process:
    """The child that holds the model: the largest one."""
    return max(psutil.Process(process.pid).children(), key=lambda child: child.memory_info().rss)


def test_a_checkpoint_is_served(tmp_path):
    """The whole way: files on disk, the script as people start it, an answer over HTTP, Ctrl-C."""
    with started(tmp_path, "-m", "5", "--root-path=/llm") as (process, url):
        answer = httpx.post(f"{url}/chat", json={"message": "hi"}, timeout=120).json()
        assert answer["usage"]["completion_tokens"] == 5 and answer["finish_reason"] == "length"
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["context_length"] == 64
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert not psutil.wait_procs(children, 60)[1], "a process is left behind"


@pytest.mark.slow
def test_answers_resume_after_a_kill(tmp_path):
    """SIGKILL to the process that holds the model: it is back in seconds; the same to the server leaves nothing."""
    with started(tmp_path, "-m", "3", "--queue-timeout=280") as (process, url):
        model = model_process(process)
        model.kill()
        killed = time.monotonic()
        answer = httpx.post(f"{url}/chat", json={"message": "hi"}, timeout=240)
        if answer.status_code == 500:  # it came before the server noticed
            assert answer.json()["code"] == "worker_failed"
            answer = httpx.post(f"{url}/chat", json={"message": "hi"}, timeout=240)
        assert answer.json()["usage"]["completion_tokens"] == 3
        print(f"back after {time.monotonic() - killed:.1f} s")
        children = psutil.Process(process.pid).children()
        process.kill()
        assert not psutil.wait_procs(children, 60)[1], "a process is left behind"


@pytest.mark.slow
def test_a_newer_checkpoint_is_loaded_on_sighup(tmp_path):
    system = tmp_path / "system.txt"
    system.write_text("Be brief.\n", encoding="utf-8")
    flags = ("--reload-model-on-sighup", f"--system-prompt-file={system}", "-m", "3")
    with started(tmp_path, *flags) as (process, url):
        assert httpx.get(f"{url}/config").json()["system_prompt"] is True
        folder = tmp_path / "chatsft_checkpoints" / "d2"
        meta = (folder / "meta_000003.json").read_text(encoding="utf-8").replace("000003", "000004")
        (folder / "model_000004.pt").write_bytes((folder / "model_000003.pt").read_bytes())
        (folder / "meta_000004.json").write_text(meta.replace('"step": 3', '"step": 4'), encoding="utf-8")
        process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 280
        while httpx.get(f"{url}/health").json()["step"] != 4:
            assert time.monotonic() < end, "the newer checkpoint is not served"
            time.sleep(0.05)
        assert httpx.post(f"{url}/chat", json={"message": "hi"}, timeout=240).status_code == 200


def test_a_missing_system_prompt_file_is_one_clear_line(tmp_path):
    result = run_script(tmp_path, "--port=0", f"--system-prompt-file={tmp_path / 'none'}")
    assert result.returncode == 2 and "cannot be read" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        ("--ssl-certfile={}/none.pem", r"--ssl-certfile=.*/none\.pem is not a file"),
        ("--ssl-certfile={}/junk", r"--ssl-certfile=.*/junk: no certificate with its key"),
        ("--ssl-keyfile={}/junk", "--ssl-keyfile needs the certificate too"),
        ("--session-db={}/nowhere/a.db", r"--session-db=.*: unable to open database file; name a database"),
        ("--session-db={}/junk", r"--session-db=.*/junk: file is not a database"),
    ],
)
def test_files_that_cannot_be_used_are_one_clear_line(tmp_path, flag, problem):
    (tmp_path / "junk").write_text("neither a certificate nor a database" * 9)
    result = run_script(tmp_path, "--port=0", flag.format(tmp_path))
    assert result.returncode == 2 and re.fullmatch(rf"error: {problem}.*\n", result.stderr), result.stderr


def test_defaults_beyond_the_limits_are_refused(tmp_path):
    result = run_script(tmp_path, "--port=0", "--temperature=3")
    assert result.returncode == 2 and "--temperature=3.0 is out of range" in result.stderr


@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        ("--max-queue=-1", "at least 0"), ("--queue-timeout=-1", "at least 0"),
        ("--request-timeout=0", "at least 1"), ("--session-ttl=0", "at least 1"),
        ("--max-sessions=-3", "at least 1"), ("--root-path=foo", "write it like /llm"),
        ("--root-path=/foo/", "write it like /llm"), ("--root-path=/", "write it like /llm"),
        ("--cors-origin=*,example.com", "=example.com is no origin"), ("--cors-origin=http://a/", "is no origin"),
    ],
)  # fmt: skip
def test_flags_that_make_no_sense_are_refused(flag, problem):
    with pytest.raises(UserError, match=f"{flag.partition('=')[0]}.*{problem}"):
        settings_of(parse(Config, [flag]))
    sensible = [
        "--max-queue=0",
        "--queue-timeout=0",
        "--root-path=/a/b",
        "--cors-origin=*,null,https://a.b:8",
    ]
    assert len(settings_of(parse(Config, sensible)).cors_origins) == 3
