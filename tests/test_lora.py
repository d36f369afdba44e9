"""Adapters: what learns, what is saved, what resuming needs."""

from __future__ import annotations

import pytest
import torch

from nanochat.checkpoint_manager import Checkpoint, list_steps
from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.lora import Adapter, AdapterOptimizer, add_adapters, merge_adapters
from nanochat.metrics import read_metrics
from scripts.chat_sft import Config
from tests.toy_data import make_world
from tests.toy_model import random_model
from tests.training import run_here, weights

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def trained_a_little(model, adapters, steps: int = 3) -> AdapterOptimizer:
    optimizer = AdapterOptimizer(adapters, 0.05, make_world(), "source")
    for _ in range(steps):
        model(IDS, IDS.roll(1, 1)).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
    return optimizer


def test_a_new_adapter_changes_nothing_and_only_adapters_learn():
    model = random_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(IDS)
    adapters = add_adapters(model, 4, 8.0)
    assert torch.equal(model(IDS), expected)
    trained_a_little(model, adapters)
    assert not torch.equal(model(IDS), expected)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in adapters}
    assert {"lm_head", "transformer.wte", "value_embeds.1", "transformer.h.0.mlp.c_fc"} <= adapters.keys()
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("tied", [False, True])
def test_the_saved_model_is_a_plain_one_that_computes_the_same(tied):
    model, plain = (random_model(seed=seed, tie_embeddings=tied) for seed in (0, 1))
    names = list(model.state_dict())
    trained_a_little(model, add_adapters(model, 4, 8.0))
    assert list(model.state_dict()) == names
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(IDS), model(IDS), atol=1e-4, rtol=1e-4)
    merge_adapters(model)
    assert not any(isinstance(module, Adapter) for module in model.modules())
    assert torch.equal(plain(IDS), model(IDS))


def test_the_gradient_of_an_adapter_is_that_of_the_weight_through_it():
    model = random_model("classic")
    adapters = add_adapters(model, 4, 8.0)
    for name in ("transformer.h.1.mlp.c_fc", "transformer.wte", "lm_head"):
        adapter = adapters[name]
        with torch.no_grad():
            adapter.up.normal_(std=0.1)
        adapter.base.requires_grad_(True)
        model.zero_grad(set_to_none=True)
        model(IDS, IDS.roll(1, 1)).backward()
        gradient, scale = adapter.base.weight.grad, adapter.scale
        torch.testing.assert_close(adapter.up.grad, scale * gradient @ adapter.down.T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(adapter.down.grad, scale * adapter.up.T @ gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_a_compiled_model_has_the_same_gradients(adapted):
    """With and without a gradient of the head. aot_eager traces as the real compiler does, and compiles nothing."""
    found = []
    for compiled in (False, True):
        model = random_model(n_layer=2)
        if adapted:
            trained_a_little(model, add_adapters(model, 4, 8.0), steps=1)
        forward = torch.compile(model, backend="aot_eager", dynamic=False) if compiled else model
        forward(IDS, IDS.roll(1, 1), loss_reduction="sum").backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    assert ("lm_head.weight" in found[0]) is not adapted
    assert ("lm_head.up" in found[0]) is adapted
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_a_state_that_does_not_fit_is_refused_before_anything_changes():
    model = random_model()
    state = trained_a_little(model, add_adapters(model, 4, 8.0)).full_state_dict()

    def optimizer(rank: int, source: str) -> AdapterOptimizer:
        return AdapterOptimizer(add_adapters(random_model(), rank, 8.0), 0.05, make_world(), source)

    with pytest.raises(UserError, match="another --lora-rank"):
        optimizer(2, "source").load_full_state_dict(state)
    with pytest.raises(UserError, match="belong to other weights"):
        optimizer(4, "other").load_full_state_dict(state)
    with pytest.raises(UserError, match="trained without LoRA"):
        optimizer(4, "source").load_full_state_dict({"state": {}, "param_groups": []})
    fitting = optimizer(4, "source")
    fitting.load_full_state_dict(state)
    saved = state["adapters"]["tensors"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in fitting._tensors.items())


def test_ranks_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="must be positive"):
        add_adapters(random_model(), -1, 8.0)
    with pytest.raises(UserError, match="as large as the matrices"):
        add_adapters(random_model(), 1000, 8.0)


@pytest.mark.parametrize("flag", ["--lora-alpha=8", "--lora-lr=0.1"])
def test_settings_of_adapters_need_a_rank(flag):
    with pytest.raises(UserError, match=f"{flag.split('=')[0]} changes nothing without --lora-rank"):
        parse(Config, [flag])
    assert parse(Config, [flag, "--lora-rank=2"]).lora_rank == 2


def test_a_run_resumes_bit_for_bit_and_later_stages_take_its_model(tiny_run):
    """SFT with adapters, killed and resumed; then RL with adapters, and full SFT, from what it left."""
    flags = {"source": "base", "lora_rank": 2, "eval_every": -1, "save_every": 2}
    run_here("base_train", num_iterations=1, eval_every=-1)
    run_here("chat_sft", **flags)
    directory = tiny_run / "chatsft_checkpoints" / "t"
    straight = weights(directory)
    rates = {name for name in read_metrics(directory / "metrics.jsonl")[0] if name.startswith("train/lr")}
    assert rates == {"train/lr", "train/lrm"}, "no matrix learns by itself"
    base = weights(tiny_run / "base_checkpoints" / "t")
    changed = {name for name in base if not torch.equal(base[name], straight[name])}
    assert changed and all(straight[name].dim() == 2 and "gate" not in name for name in changed)
    for path in directory.glob("*_000004.*"):
        path.unlink()
    run_here("chat_sft", **flags)
    resumed = weights(directory)
    assert list_steps(directory) == [2, 4]
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    with pytest.raises(UserError, match="--lora-rank"):
        run_here("chat_sft", **flags | {"lora_rank": 0})

    run_here("chat_rl", lora_rank=2, eval_every=-1, num_iterations=1)
    assert weights(tiny_run / "chatrl_checkpoints" / "t").keys() == base.keys()
    run_here("chat_sft", source="sft", output_tag="full", eval_every=-1, num_iterations=1)
    assert "adapters" not in (Checkpoint.open(directory.parent / "full", 1).optimizer_state() or {})
