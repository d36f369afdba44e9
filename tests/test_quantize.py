"""Eight bits of weight: half the bytes, nearly the same numbers, and the cost is said."""

from __future__ import annotations

import random
import re

import pytest
import torch

from nanochat.common import UserError
from nanochat.engine import Engine, SamplingParams
from nanochat.gpt import Linear
from nanochat.quantize import QuantizedLinear, quantize, replace_matrices
from nanochat.roofline import ModelCost
from tests.toy_export import tokenizer, toy_model, trained
from tests.toy_model import random_model

pytestmark = pytest.mark.usefixtures("one_seeded_thread")


KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def matrix(layer: QuantizedLinear) -> torch.Tensor:
    return layer.weight.float() * layer.scale[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_sums_in_fp16_stay_in_range(kind):
    """Before they are scaled they would not: 127 * 5,120 is ten times what fp16 holds."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(5120, 8, bias=False)
    torch.nn.init.normal_(linear.weight, std=0.02)
    x = (linear.weight.detach().sign() * 0.5).half()
    wanted = x.float() @ linear.weight.detach().T
    assert wanted.max() > 39
    rows = x.repeat(3, 1)  # more than the few that int8 has a kernel for
    found = QuantizedLinear(linear, KINDS[kind])(rows)[:8]
    torch.testing.assert_close(found.float(), wanted, atol=0.3, rtol=0.03)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_within_half_a_step_of_its_weights(kind, rows, dtype):
    linear = torch.nn.Linear(64, 96, bias=False)
    torch.nn.init.normal_(linear.weight)
    narrow = QuantizedLinear(linear, KINDS[kind])
    step = narrow.scale[:, None]  # of e4m3: an eighth of the power of two below, for small numbers 2^-9
    if kind == "fp8":
        step = step * 2.0 ** ((linear.weight / step).abs().log2().floor().clamp_min(-6) - 3)
    wide = matrix(narrow)
    assert ((wide - linear.weight).abs() <= 0.501 * step).all()
    x = torch.randn(2, rows, 64).to(dtype)
    expected = x.float() @ wide.T
    found = narrow(x)
    assert found.dtype == dtype and found.shape == (2, rows, 96)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert (found.float() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_not_rounded_to_bf16(kind):
    narrow = QuantizedLinear(torch.nn.Linear(64, 1200, bias=False), KINDS[kind])
    x = torch.randn(2, 3, 64).bfloat16()
    torch.testing.assert_close(narrow.in_fp32(x), x.float() @ matrix(narrow).T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows_stay_zero(kind):
    linear = torch.nn.Linear(32, 32, bias=False)
    torch.nn.init.zeros_(linear.weight)
    assert not QuantizedLinear(linear, KINDS[kind])(torch.randn(1, 32)).any()


def test_says_what_it_saved_and_cost():
    moved = {}
    for kind in KINDS:
        model = trained(toy_model("grouped"))
        before = ModelCost.of(model)
        line = replace_matrices(model, kind, tokenizer())
        after = ModelCost.of(model)
        assert 3.5 < before.weight_bytes_read / after.weight_bytes_read <= 4
        assert after.matrix_params == before.matrix_params
        found = re.fullmatch(
            rf"{kind} weights: [\d.]+ MB of matrices become [\d.]+ MB; "
            r"loss on a sample text ([\d.]+) -> ([\d.]+) bits per byte \([+-][\d.]+\); "
            r"relative entropy of the predictions ([\d.]+) bits per byte",
            line,
        )
        assert found, line
        old, new, moved[kind] = map(float, found.groups())
        assert old > 0 and abs(new - old) < 0.05 * old
    assert 0 < moved["int8"] < moved["fp8"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["classic", "modern"])
def test_generation_goes_on_with_it(architecture, kind):
    model = random_model(architecture)
    assert quantize(model, "none") == "weights are not quantised"
    replace_matrices(model, kind)
    prompts = [random.Random(n).choices(range(256), k=n) for n in (1, 20, 31)]
    params = SamplingParams(temperature=0, max_tokens=20)
    from tests.toy_model import ByteTokenizer

    found = Engine(model, ByteTokenizer(), tools={}).complete_many(prompts, params)
    for prompt, completion in zip(prompts, found, strict=True):
        plain = list(model.generate(prompt, len(completion.tokens), temperature=0))
        assert completion.tokens == plain


def test_unknown_kinds_are_one_line():
    with pytest.raises(UserError, match="int8"):
        quantize(random_model("classic"), "int3")
    with pytest.raises(UserError, match=r"NVIDIA.*cpu.*--quantize=int8"):
        quantize(random_model("classic"), "fp8")


def test_gates_stay_as_they_are():
    model = random_model("modern", n_embd=512, n_head=32, n_kv_head=32, ve_gate_channels=32)
    replace_matrices(model, "int8")
    assert {type(block.attn.ve_gate) for block in model.blocks if hasattr(block.attn, "ve_gate")} == {Linear}
    assert type(model.blocks[0].attn.c_q) is QuantizedLinear
