"""LangChain's and LlamaIndex's OpenAI classes stream a chat, each in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

import pytest
import torch

from nanochat.serve.settings import Settings
from tests.serving import GREEDY, script, scripted_replica, served

CLIENT = Path(__file__).with_name("openai_frameworks.py")
PACKAGES = {"langchain": "langchain-openai", "llama_index": "llama-index-llms-openai-like"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("framework", PACKAGES)
def test_a_framework_streams_a_chat(framework: str, tmp_path: Path):
    torch.set_num_threads(1)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", PACKAGES[framework]]
    installed = subprocess.run(install, capture_output=True, text=True, timeout=1200)
    if installed.returncode:
        pytest.skip(f"{PACKAGES[framework]} cannot be installed here: {installed.stderr.strip()[-300:]}")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OPENAI_API_KEY")}
    with served(lambda index: scripted_replica(script), Settings(defaults=GREEDY)) as server:
        done = subprocess.run(
            [python, CLIENT, framework, f"{server.url}/v1", "hello"],
            capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    count, _, text = done.stdout.strip().partition(" ")
    # the system text stands before the question, divided by a blank line
    assert text.replace("\n", "|") == "1:Be brief.||hello" and int(count) > 5, done.stdout
