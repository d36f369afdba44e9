"""When the GPU's decode step is taken; what it computes is in cuda_decode_cases.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.cuda_decode import CudaDecoder, bucket, is_suitable
from nanochat.cuda_read import _tile
from nanochat.lora import add_adapters
from nanochat.row_cache import _MOST_PADDING
from tests.toy_model import random_model

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels():
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda_decode_cases.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | interpreted, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def test_buckets():
    expected = {1: 1, 2: 2, 3: 4, 5: 8, 8: 8, 9: 16, 24: 32, 64: 64, 65: 128, 200: 256, 257: 320}
    assert {rows: bucket(rows) for rows in expected} == expected
    assert max(bucket(rows) - rows for rows in range(1, 1000)) < _MOST_PADDING


def test_tiles_of_prompts_fit_the_shared_memory():
    h100, rtx_4090, t4 = 227 << 10, 99 << 10, 64 << 10
    for shared, tile in ((h100, (64, 64, 2)), (rtx_4090, (64, 64, 2)), (t4, (64, 32, 2))):
        assert _tile(128, 2, shared, has_tensor_cores=True) == tile
    for shared in (h100, rtx_4090, t4):  # fp32, and fp16 on a T4
        for head_dim, itemsize, tile in (
            (64, 4, (32, 32, 2)),
            (128, 4, (16, 16, 1)),
            (256, 4, (16, 16, 1)),
            (128, 2, (16, 16, 1)),
        ):
            assert _tile(head_dim, itemsize, shared, has_tensor_cores=False) == tile


def test_models_that_it_leaves_alone():
    assert is_suitable(random_model("modern"))
    assert not is_suitable(random_model("classic", n_embd=96))  # heads of 24
    assert not is_suitable(random_model("classic", n_embd=32))  # heads of 8
    assert not is_suitable(random_model("modern", qk_scale=5.0))
    adapted = random_model("classic")
    add_adapters(adapted, 4, 8.0)
    assert not is_suitable(adapted)
    assert CudaDecoder.of(random_model("classic")) is None  # on a processor
    assert CudaDecoder.of(object()) is None
