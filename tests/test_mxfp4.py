"""MXFP4 rounding against the specification's numbers, and training with it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from nanochat.gpt import GPT, GPTConfig
from nanochat.mxfp4 import BLOCK, MXFP4Linear, convert_to_mxfp4, dequantise, quantise, straight_through

pytestmark = pytest.mark.usefixtures("one_seeded_thread")
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # by code, that is by exponent and mantissa bits


def block(*values: float) -> torch.Tensor:
    return torch.tensor([*values, *[0.0] * (BLOCK - len(values))])


def rounded(*values: float) -> list[float]:
    return dequantise(*quantise(block(*values)))[: len(values)].tolist()


def test_every_number_of_the_format_is_kept():
    numbers = E2M1 + [-number for number in E2M1]
    for scale in (2.0**-20, 1.0, 2.0**9):
        assert rounded(*(scale * number for number in numbers)) == [scale * number for number in numbers]


@pytest.mark.parametrize("sign", [1, -1])
def test_ties_go_to_the_number_with_an_even_code(sign):
    """The largest, 4, makes the scale 1, so that ties lie half way between neighbours of the format."""
    ties = [(low + high) / 2 for low, high in pairwise(E2M1)]
    even = [E2M1[code] if code % 2 == 0 else E2M1[code + 1] for code in range(len(ties))]
    assert rounded(4.0, *(sign * tie for tie in ties))[1:] == [sign * number for number in even]
    assert rounded(4.0, *(sign * math.nextafter(tie, 9) for tie in (0.250001, 2.500001, 3.500001)))[1:] == [
        sign * 0.5, sign * 3.0, sign * 4.0,
    ]  # fmt: skip
    assert rounded(4.0, sign * 5.001)[1] == sign * 6.0


@pytest.mark.parametrize(
    ("largest", "exponent", "becomes"),
    [
        (6.0, 0, 6.0), (4.0, 0, 4.0), (7.99, 0, 6.0), (8.0, 1, 8.0), (3.9, -1, 3.0), (1.0, -2, 1.0),
        (0.0, -127, 0.0), (2.0**-126, -127, 2.0**-126), (3e38, 125, 1.5 * 2.0**127),
    ],
)  # fmt: skip
def test_the_scale_is_the_power_of_two_of_the_largest_over_four(largest, exponent, becomes):
    elements, exponents = quantise(block(largest, -largest))
    assert exponents.tolist() == [[float(exponent)]]
    assert dequantise(elements, exponents)[:2].tolist() == [becomes, -becomes]


def test_blocks_are_scaled_apart_and_along_the_last_dimension():
    x = torch.stack([torch.cat([block(6.0, 1.0), block(6e-3)]), torch.cat([block(96.0, 1.0), block(1.0)])])
    assert quantise(x)[1].squeeze(-1).tolist() == [[0, -10], [4, -2]]
    assert dequantise(*quantise(x))[1, :2].tolist() == [96.0, 0.0]  # 1 / 16 is nearer to 0 than to 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(value):
    x = torch.cat([block(value, 1.0), block(1.0)])
    y = dequantise(*quantise(x))
    assert y[:BLOCK].isnan().all() and y[BLOCK:].isfinite().all()


def test_rounding_again_changes_nothing():
    once = straight_through(torch.randn(16, 4 * BLOCK), torch.bfloat16)
    assert torch.equal(straight_through(once, torch.float32), once.float())
    error = (dequantise(*quantise(x := torch.randn(64, 1024))) - x).norm() / x.norm()
    assert 0.10 < error < 0.13


def test_gradients_are_those_of_the_rounded_product():
    exact = nn.Linear(64, 48)
    layer = MXFP4Linear(exact)
    x, direction = torch.randn(3, 5, 64, requires_grad=True), torch.randn(3, 5, 48)
    layer(x).backward(direction)
    x4, weight4 = (dequantise(*quantise(tensor.detach())) for tensor in (x, exact.weight))
    torch.testing.assert_close(layer(x), x4 @ weight4.T + exact.bias)
    torch.testing.assert_close(x.grad, direction @ weight4)
    torch.testing.assert_close(exact.weight.grad, direction.flatten(0, 1).T @ x4.flatten(0, 1))


def small_model() -> GPT:
    sizes = {"sequence_len": 32, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 64}
    model = GPT.build(GPTConfig.modern(**sizes), "cpu", torch.float32)
    model.init_weights()
    return model


def test_the_blocks_of_a_model_are_converted_under_their_names():
    model = small_model()
    before = dict(model.named_parameters())
    assert convert_to_mxfp4(model.transformer) == (12, 13)  # the gate of the value embedding has 12 inputs
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


def test_training_goes_down_about_as_far_as_in_full_precision():
    """Repeated random tokens, which attention has to look up."""
    last = {}
    for precision in ("mxfp4", "fp32"):
        torch.manual_seed(1)
        model = small_model()
        if precision == "mxfp4":
            convert_to_mxfp4(model.transformer)
        optimizer, losses = model.setup_optimizer(), []
        for _ in range(40):
            rows = torch.randint(0, 64, (16, 8)).repeat(1, 5)[:, :33]
            loss = model(rows[:, :-1], rows[:, 1:])
            loss.backward()
            optimizer.step()
            model.zero_grad(set_to_none=True)
            losses.append(loss.item())
        assert losses[0] == pytest.approx(math.log(64), abs=0.1)
        last[precision] = sum(losses[-5:]) / 5
    assert last["mxfp4"] < 3.3 and last["mxfp4"] < last["fp32"] + 0.4
