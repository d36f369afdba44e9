"""dev/serve_vllm.sh starts vLLM with what our exports need, and refuses what vLLM would compute wrongly."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "dev" / "serve_vllm.sh"


@pytest.fixture
def run(tmp_path):
    """Run the script with a vllm that prints its arguments."""
    stand_in = tmp_path / "bin" / "vllm"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)

    def run(*arguments: str, path: str = f"{stand_in.parent}:{os.environ['PATH']}"):
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=30, cwd=tmp_path,
            env=os.environ | {"PATH": path},
        )  # fmt: skip

    return run


def folder(tmp_path: Path, model_type: str) -> str:
    (tmp_path / "my model").mkdir()
    (tmp_path / "my model" / "config.json").write_text(json.dumps({"model_type": model_type}, indent=2))
    return "my model"


def test_the_command(run, tmp_path):
    done = run(folder(tmp_path, "nanochat"), "--port", "9000")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "serve", "my model", "--model-impl", "transformers", "--chat-template-content-format", "string",
        "--served-model-name", "my model", "--port", "9000",
    ]  # fmt: skip


def test_refusals(run, tmp_path):
    for arguments, complaint in (([], "usage"), (["nowhere"], "no exported model")):
        done = run(*arguments)
        assert done.returncode == 2 and complaint in done.stderr
    done = run(folder(tmp_path, "nanochat_modern"))
    assert done.returncode == 2 and "classic models only" in done.stderr


def test_without_vllm(run, tmp_path):
    done = run(folder(tmp_path, "nanochat"), path="/usr/bin:/bin")
    assert done.returncode == 2 and "vllm was not found" in done.stderr
