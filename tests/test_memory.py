"""The estimate of memory by kind, and what is known of cards."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanochat import memory
from nanochat.compilation import should_compile
from nanochat.memory import Setting, training_bytes, training_memory
from nanochat.network_config import GPTConfig
from nanochat.scaling import model_dimensions

ROOT = Path(__file__).resolve().parent.parent


def test_kinds_follow_the_sizes():
    config = GPTConfig()
    one, eight = (training_memory(config, Setting(16, world_size=size)) for size in (1, 8))
    assert one.optimizer == 8 * eight.optimizer and one.weights == eight.weights == one.gradients
    twice = training_memory(config, Setting(32))
    assert 1.8 < twice.activations / one.activations <= 2
    again = training_memory(config, Setting(16, recompute=True))
    assert again.activations < one.activations / 2 and again.logits == one.logits


def test_the_logits_of_a_chunk_do_not_grow_with_the_batch():
    """Only what is as large as the hidden states does."""
    config = GPTConfig()
    small, large = (training_memory(config, Setting(rows, compiled=False)).logits for rows in (16, 32))
    assert large - small == 2 * 16 * 2048 * config.n_embd * 2


def test_the_peak_that_an_h200_measured():
    """Depth 20, 16 rows, compiled, bf16: 43.6 GiB (LOG 2026-11-26)."""
    peak = training_memory(GPTConfig.modern(**model_dimensions(20)), Setting(16, accumulation=16)).peak
    assert peak / 2**30 == pytest.approx(43.6, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no way to measure the peak here")
@pytest.mark.parametrize(
    ("arch", "layers", "width", "length", "rows", "micro_batches", "recompute", "compile", "vocab"),
    [
        ("classic", 4, 256, 512, 8, 1, 0, 0, 4096),
        ("classic", 2, 256, 256, 32, 2, 0, 0, 8192),
        ("modern", 4, 256, 512, 8, 1, 0, 0, 4096),
        ("modern", 2, 256, 2048, 2, 1, 0, 0, 4096),
        ("modern", 4, 384, 256, 8, 1, 1, 0, 8192),
        ("modern", 6, 384, 128, 8, 2, 0, 0, 4096),
        ("classic", 2, 256, 512, 16, 1, 0, 1, 4096),
    ],
)
def test_the_peak_that_this_machine_measures(
    arch, layers, width, length, rows, micro_batches, recompute, compile, vocab
):
    """Within 10 %, above what a process that trains something tiny takes anyway."""
    if compile and not should_compile("auto", torch.device("cpu"))[0]:
        pytest.skip("nothing compiles here")
    numbers = (layers, width, length, rows, micro_batches, recompute, compile, vocab)
    command = [sys.executable, "-m", "tests.memory_peak", arch, *map(str, numbers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1000:]
    config = getattr(GPTConfig, arch)(
        vocab_size=vocab, sequence_len=length, **model_dimensions(layers, width // layers, 64)
    )
    setting = Setting(
        rows, accumulation=micro_batches, compute_bytes=4, on_gpu=False, compiled=bool(compile), recompute=bool(recompute)
    )  # fmt: skip
    assert config.n_embd == width
    assert training_memory(config, setting).peak == pytest.approx(int(done.stdout), rel=0.1)


def test_gradients_count_in_the_forward_pass_once_a_step_has_several_micro_batches():
    memory = training_memory(GPTConfig(), Setting(16, accumulation=2))
    assert memory.peak - training_memory(GPTConfig(), Setting(16)).peak == memory.gradients


def test_the_estimate_agrees_with_what_is_known_of_80_gb_cards():
    card = 0.92 * 80e9
    flagship = GPTConfig.modern(**model_dimensions(24))
    assert training_bytes(flagship, 16, 8) < card < training_bytes(flagship, 32, 8)
    large = GPTConfig.modern(vocab_size=65536, **model_dimensions(32))
    assert training_bytes(large, 8, 8) < 80e9 < training_bytes(large, 16, 8)


def test_uncompiled_blocks_keep_what_saved_tensors_add_up_to(monkeypatch):
    """Counted with torch's hooks at width 256, 4 heads and 256 tokens, in units of a token's channels (LOG 2026-11-25)."""
    counted = {("modern", 4, True): 19.5, ("modern", 4, False): 23.5, ("classic", 4, True): 18, ("classic", 4, False): 22,
               ("modern", 2, True): 23.5, ("classic", 2, True): 22}  # fmt: skip
    monkeypatch.setattr(memory, "find_compiler", lambda: None)  # our kernel keeps no probabilities
    for (arch, size, on_gpu), values in counted.items():
        setting = Setting(1, compute_bytes=size, on_gpu=on_gpu, compiled=False)
        network = getattr(GPTConfig, arch)(vocab_size=64, sequence_len=256, n_embd=256, n_head=4, n_kv_head=4)
        small, large = (
            training_memory(replace(network, n_layer=layers), setting).activations for layers in (4, 8)
        )
        casts = 4 * 12 * 256**2 * size if size < 4 else 0
        gates = 2 * 4 * 12 * size if arch == "modern" and size < 4 else 0
        assert large - small == 4 * values * 256 * 256 * size + casts + gates
