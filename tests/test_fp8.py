"""FP8 products against exact ones; torch's scaled product runs on a CPU too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nanochat.fp8 import Float8Linear, convert_to_float8, quantise, supports_fp8, without_float8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


pytestmark = pytest.mark.usefixtures("one_seeded_thread")


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("values", "dtype", "expected", "inverse"),
    [
        ([1.0, -2.0, 0.0], E4M3, [224.0, -448.0, 0.0], 2 / 448),
        ([3e4, 1.0, 1e-8], E4M3, [448.0, 0.015625, 0.0], 3e4 / 448),
        ([0.0, 0.0], E4M3, [0.0, 0.0], 1e-12 / 448),
        ([1.0, -4.0], E5M2, [14336.0, -57344.0], 4 / 57344),
    ],
)
def test_quantise_exactly(values, dtype, expected, inverse):
    quantised, factor = quantise(torch.tensor(values), dtype)
    assert quantised.dtype == dtype and quantised.float().tolist() == expected
    assert factor.dtype == torch.float32
    assert factor.item() == pytest.approx(inverse, rel=1e-6)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_quantise_never_overflows(dtype, size):
    quantised, inverse = quantise(size * torch.randn(1000), dtype)
    assert quantised.float().isfinite().all() and inverse.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32,), (2, 16), (3, 7), (1,)])  # 21 and 1 rows need padding
def test_products_are_within_the_error_of_eight_bits(dtype, shape):
    exact = nn.Linear(128, 256, bias=False)
    exact.weight.data.normal_()
    eight = Float8Linear(exact)
    x = torch.randn(*shape, 128)
    direction = torch.randn(*shape, 256)
    results = []
    for layer, source in ((exact, x), (eight, x.to(dtype))):
        source = source.clone().requires_grad_()
        exact.weight.grad = None
        output = layer(source)
        output.backward(direction.to(output.dtype))
        assert output.dtype == source.dtype and output.shape == (*shape, 256)
        results.append((output.float(), source.grad.float(), exact.weight.grad.clone()))
    (y, grad_x, grad_w), (y8, grad_x8, grad_w8) = results
    assert 0.005 < relative_error(y8, y) < 0.05
    assert 0.005 < relative_error(grad_x8, grad_x) < 0.08
    assert 0.005 < relative_error(grad_w8, grad_w) < 0.09
    assert grad_w8.dtype == torch.float32


def test_bias_is_added():
    exact = nn.Linear(128, 128)
    exact.bias.data.fill_(100.0)
    assert (Float8Linear(exact)(torch.zeros(16, 128)) == 100).all()


def test_only_large_aligned_layers_are_converted_and_names_stay():
    model = nn.Sequential(
        nn.Linear(128, 512), nn.Linear(512, 120), nn.Linear(12, 256), nn.Sequential(nn.Linear(256, 128))
    )
    before = dict(model.named_parameters())
    assert convert_to_float8(model) == (2, 4)
    assert [type(m) is Float8Linear for m in (model[0], model[1], model[2], model[3][0])] == [
        True,
        False,
        False,
        True,
    ]
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


def test_evaluation_is_exact_and_training_goes_on_even_after_an_error():
    exact = nn.Sequential(nn.Linear(128, 128))
    model = nn.Sequential(nn.Linear(128, 128))
    model.load_state_dict(exact.state_dict())
    convert_to_float8(model)
    x = torch.randn(16, 128)
    with pytest.raises(RuntimeError, match="inside"), without_float8(model):
        assert torch.equal(model(x), exact(x))
        raise RuntimeError("inside")
    assert not torch.equal(model(x), exact(x))


def test_a_layer_can_be_trained():
    torch.manual_seed(3)
    target = nn.Linear(128, 128, bias=False)
    model = nn.Sequential(nn.Linear(128, 128, bias=False))
    convert_to_float8(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=8.0)
    losses = []
    for _ in range(25):
        x = torch.randn(32, 128)
        loss = (model(x) - target(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


def test_gpt_of_depth_24_has_145_of_158_layers_in_fp8():
    from nanochat.gpt import GPT, GPTConfig

    sizes = {
        "sequence_len": 2048,
        "vocab_size": 32768,
        "n_layer": 24,
        "n_head": 12,
        "n_kv_head": 12,
        "n_embd": 1536,
    }
    with torch.device("meta"):
        model = GPT(GPTConfig.modern(**sizes))
    names = set(model.state_dict())
    assert convert_to_float8(model) == (145, 158)
    assert set(model.state_dict()) == names


def test_the_reason_is_given_where_there_is_no_hardware():
    assert supports_fp8(torch.device("cpu")) == (False, "cpu has no FP8 tensor cores")


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    layer = Float8Linear(nn.Linear(128, 128, bias=False))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(32, 128, requires_grad=True)
    output = compiled(x)
    output.sum().backward()
    torch.testing.assert_close(output, layer(x))
    assert x.grad is not None and layer.weight.grad is not None
