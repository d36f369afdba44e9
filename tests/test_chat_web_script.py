"""`python -m scripts.chat_web` as people start it: a checkpoint served, and what can be wrong at start."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import httpx

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.gpt import GPT, GPTConfig
from tests.serving import byte_tokenizer


def run_script(tmp_path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "scripts.chat_web", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


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
    assert result.stderr.startswith("error: no checkpoint in ") and result.stderr.count("\n") == 1


def test_a_checkpoint_is_served(tmp_path):
    """The whole way: files on disk, the script as people start it, an answer over HTTP, Ctrl-C."""
    tokenizer = byte_tokenizer()
    sizes = {"sequence_len": 64, "vocab_size": tokenizer.get_vocab_size(), "n_layer": 2, "n_head": 2}
    model = GPT(GPTConfig.modern(**sizes, n_kv_head=2, n_embd=64))
    model.init_weights()
    save_checkpoint(tmp_path / "chatsft_checkpoints" / "d2", 3, model, {}, tokenizer=tokenizer)
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "scripts.chat_web",
        "--port=0",
        "--device-type=cpu",
        "-m",
        "5",
        "-t",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("nanochat-sft-d2, step 3, on cpu")
            url = process.stdout.readline().split()[1]
            answer = httpx.post(f"{url}/chat", json={"message": "hi"}, timeout=30).json()
            assert answer["usage"]["completion_tokens"] == 5 and answer["finish_reason"] == "length"
            assert httpx.get(f"{url}/v1/models").json()["data"][0]["context_length"] == 64
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
        finally:
            process.kill()


def test_defaults_beyond_the_limits_are_refused(tmp_path):
    result = run_script(tmp_path, "--port=0", "--temperature=3")
    assert result.returncode == 2 and "--temperature=3.0 is out of range" in result.stderr
