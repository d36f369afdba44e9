"""How soon `python -m scripts.chat_cli -p` answers: a d12 of random weights on the CPU, starts in a row.

    python -m dev.bench.startup --starts=7

The tokenizer is that of NANOCHAT_BASE_DIR (`bash runs/speedrun.sh` leaves one in the default folder). The weights are in
the system's cache, as after any earlier start. Compare with importing torch alone, which is timed in turns. JSON last.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.configurator import option, run

ANSWER = ("-m", "scripts.chat_cli", "-p", "hello", "-m", "1", "--device-type=cpu")


@dataclass(frozen=True)
class Config:
    depth: int = option(12, "layers of the model")
    starts: int = option(7, "timed starts")


def make_checkpoint(depth: int, base: Path) -> None:
    """A finetuned model of random weights in another base folder, with the tokenizer of this one."""
    import torch

    from nanochat.checkpoint_manager import save_checkpoint
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.tokenizer import get_tokenizer

    tokenizer = get_tokenizer()
    heads = max(1, depth // 2)
    config = GPTConfig.modern(
        sequence_len=2048, vocab_size=tokenizer.get_vocab_size(), n_layer=depth, n_head=heads, n_kv_head=heads,
        n_embd=64 * depth,
    )  # fmt: skip
    model = GPT.build(config, "cpu", torch.float32)
    model.init_weights()
    save_checkpoint(
        base / "chatsft_checkpoints" / f"d{depth}", 1, model, {"stage": "sft"}, tokenizer=tokenizer
    )


def seconds(arguments: tuple[str, ...], base: Path) -> float:
    """Wall-clock time of a Python process from start to end."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], env={**environment, "NANOCHAT_BASE_DIR": str(base)}, check=True,
        capture_output=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - begun


def main(cfg: Config) -> None:
    """Time starts of the terminal chat, in turns with importing torch."""
    base = Path(tempfile.mkdtemp())
    try:
        make_checkpoint(cfg.depth, base)
        seconds(ANSWER, base)  # writes bytecode, compiles the decode step where there is a compiler
        found: dict[str, list[float]] = {"answer": [], "import torch": []}
        for number in range(cfg.starts):
            found["answer"].append(seconds(ANSWER, base))
            found["import torch"].append(seconds(("-c", "import torch"), base))
            print(f"start {number + 1}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in found.items()))
    finally:
        shutil.rmtree(base)
    print(
        json.dumps({"depth": cfg.depth, **{name: statistics.median(times) for name, times in found.items()}})
    )


if __name__ == "__main__":
    run(Config, main)
