"""One configuration in a process of its own: the memory that its training steps take at their peak.

    python -m tests.memory_peak ARCH LAYERS WIDTH TOKENS ROWS MICRO_BATCHES RECOMPUTE COMPILE VOCABULARY

Prints the bytes of resident memory above those of a process that has trained something tiny. Freed blocks go back to
the system here: kept ones, as in a run, are a matter of malloc.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import torch

from nanochat.common import distributed
from nanochat.flash_attention import describe_backend
from nanochat.gpt import GPT, GPTConfig

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def resident(kind: str) -> int:
    """Bytes; VmRSS now, VmHWM the most since the mark was cleared."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found
    return 1024 * int(found[1])


def train(arch: str, layers: int, width: int, length: int, rows: int, micro_batches: int, recompute: bool, compile: bool,
          vocab: int) -> None:  # fmt: skip
    """Two steps: in the second one the moments are there from the start."""
    heads = width // 64
    config = getattr(GPTConfig, arch)(
        sequence_len=length, vocab_size=vocab, n_layer=layers, n_head=heads, n_kv_head=heads, n_embd=width,
    )  # fmt: skip
    model = GPT.build(config, "cpu", torch.float32)
    model.init_weights()
    model.recompute = recompute
    optimizer = model.setup_optimizer()
    forward = torch.compile(model, dynamic=False) if compile else model
    for _ in range(2):
        for _ in range(micro_batches):
            ids = torch.randint(vocab, (rows, length))
            forward(ids, ids, loss_reduction="sum").backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)


def main() -> None:
    arch, *numbers = sys.argv[1:]
    layers, width, length, rows, micro_batches, recompute, compile, vocab = map(int, numbers)
    with distributed("cpu") as world:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 17)
        mallopt(M_TRIM_THRESHOLD, 1 << 17)
        describe_backend(world.device, torch.float32)
        # With what the measured one uses, too: recomputing imports torch's compiler, 170 MB.
        train(arch, 2, 64, 64, 2, 1, bool(recompute), bool(compile), 256)
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # clears the mark
        train(arch, layers, width, length, rows, micro_batches, bool(recompute), bool(compile), vocab)
        print(resident("VmHWM") - before)


if __name__ == "__main__":
    main()
