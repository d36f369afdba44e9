"""The GPU's decode step computes what the network does: cases that test_cuda_decode.py runs in a process of their own.

Without a GPU that process runs the kernels in Triton's interpreter, which must be chosen before Triton is imported.
"""

from __future__ import annotations

import random

import pytest
import torch

from nanochat.cuda_decode import CudaDecoder
from nanochat.gpt import GPT
from nanochat.quantize import replace_matrices
from nanochat.row_cache import RowCache
from tests.toy_model import begun_cache, random_model, row_contents

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
KINDS = ("int8", "fp8")
WINDOWS = dict(sequence_len=96, short_window_divisor=12, short_window_multiple=8)


def small_model(architecture: str, **sizes) -> GPT:
    small = {"vocab_size": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
    return random_model(architecture, **{**small, **sizes}).to(DEVICE)


def prefilled(model: GPT, lengths: list[int], decoder: CudaDecoder | None) -> RowCache:
    cache = begun_cache(model, len(lengths), 80)
    cache._decoder = decoder
    for row, length in enumerate(lengths):
        ids = random.Random(length).choices(range(64), k=length)
        cache.forward(row, row + 1, torch.tensor([ids], device=DEVICE))
    return cache


def check(model: GPT, lengths: list[int], ready: int, steps: int, expected_by: GPT | None = None) -> None:
    """Some steps of the first rows, against the network's."""
    ours = prefilled(model, lengths, CudaDecoder(model, use_graphs=HAS_GPU))
    theirs = prefilled(expected_by or model, lengths, None)
    for number in range(steps):
        ids = random.Random(number).choices(range(64), k=ready)
        expected = theirs.decode(ready, ids)
        given = torch.tensor(ids, device=DEVICE) if number % 2 else ids
        torch.testing.assert_close(ours.decode(ready, given), expected, atol=3e-5, rtol=0)
    assert ours.positions == theirs.positions
    for row in range(len(lengths)):
        for a, b in zip(row_contents(ours, row), row_contents(theirs, row), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    if ours.previous is not None and theirs.previous is not None:
        torch.testing.assert_close(ours.previous, theirs.previous, atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [[20], [5, 1, 16]])
@pytest.mark.parametrize("architecture", ["classic", "modern"])
def test_equals_the_network(architecture, lengths):
    check(small_model(architecture), lengths, len(lengths), 2)


@torch.inference_mode()
def test_windows_and_their_rings():
    check(small_model("modern", n_kv_head=4, **WINDOWS), [61, 60], 2, 6)


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [[6], [6, 9]])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised(kind, lengths):
    model = small_model("modern")
    replace_matrices(model, kind)
    check(model, lengths, len(lengths), 1)


@torch.inference_mode()
def test_padding_spares_rows_that_are_not_ready():
    """Three rows step as four; the fourth is in the middle of its prompt and goes on as if nothing had happened."""
    model = small_model("modern", **WINDOWS)
    check(model, [7, 3, 12, 30, 5], 3, 2)
    ours, theirs = (
        prefilled(model, [7, 3, 12, 30, 5], decoder) for decoder in (CudaDecoder(model, HAS_GPU), None)
    )
    ours.decode(3, [1, 2, 3])
    theirs.decode(3, [1, 2, 3])
    more = torch.tensor([[4, 5, 6]], device=DEVICE)
    torch.testing.assert_close(ours.forward(3, 4, more), theirs.forward(3, 4, more), atol=1e-5, rtol=0)
