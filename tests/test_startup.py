"""What the start of a chat may not do; dev/bench/startup.py times it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Half a second each and more: the compiler, the web server, and what reads data sets.
HEAVY = {
    "torch._dynamo", "torch._inductor", "sympy", "fastapi", "pydantic", "starlette", "uvicorn", "pyarrow", "pandas",
    "transformers", "datasets", "matplotlib", "wandb", "requests", "rich", "prompt_toolkit",
}  # fmt: skip


def make_checkpoint(base: Path, depth: int) -> None:
    """An SFT checkpoint of random weights, of the shape that --depth gives, with the tokenizer of the folder."""
    import torch

    from nanochat.checkpoint_manager import save_checkpoint, stage_dir
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.tokenizer import get_tokenizer

    tokenizer = get_tokenizer()
    config = GPTConfig.modern(
        sequence_len=2048, vocab_size=tokenizer.get_vocab_size(), n_layer=depth,
        n_head=max(1, depth // 2), n_kv_head=max(1, depth // 2), n_embd=64 * depth,
    )  # fmt: skip
    model = GPT.build(config, "cpu", torch.float32)
    model.init_weights()
    save_checkpoint(stage_dir("sft") / f"d{depth}", 1, model, {"stage": "sft"}, tokenizer=tokenizer)


def first_answer(*python_options: str, prompt: str = "hello") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        *python_options,
        "-m",
        "scripts.chat_cli",
        "-p",
        prompt,
        "-m",
        "1",
        "--device-type=cpu",
    ]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("words", [1, 150])
def test_a_start_imports_nothing_heavy(tiny_run, words):
    """Whether the prompt is read by the compiled step or, a long one, by the network."""
    make_checkpoint(tiny_run, 2)
    done = first_answer("-X", "importtime", prompt="hello " * words)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "torch" in modules and not modules & HEAVY
