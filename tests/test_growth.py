"""Layers on top of a trained model: where they start, what learns, and runs that have them."""

from __future__ import annotations

import pytest
import torch

from nanochat.checkpoint_manager import Checkpoint, list_steps
from nanochat.common import UserError
from nanochat.growth import freeze, grow
from tests.toy_model import random_model
from tests.training import run_here, weights

SIZES = dict(sequence_len=16, vocab_size=50, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
IDS = torch.arange(12).view(2, 6) % 50


def test_a_classic_model_computes_the_same_after_growing():
    model = random_model("classic", **SIZES)
    grown = grow(model, 3)
    assert grown.config.n_layer == 5
    torch.testing.assert_close(grown(IDS), model(IDS))


@pytest.mark.parametrize("tied", [False, True])
def test_a_modern_model_differs_by_the_scalars_alone(tied):
    model = random_model(**SIZES, window_pattern="L", tie_embeddings=tied)
    grown = grow(model, 2)
    with torch.no_grad():
        model.backout_lambda.zero_()
        grown.x0_lambdas[2:] = 0
    torch.testing.assert_close(grown(IDS), model(IDS))
    assert (grown.lm_head.weight is grown.wte.weight) is tied


def test_value_embeddings_keep_their_layers():
    with pytest.raises(UserError, match="--add-layers=3 must be even"):
        grow(random_model(**SIZES), 3)
    with pytest.raises(UserError, match="--add-layers=-2 must be positive"):
        grow(random_model("classic", **SIZES), -2)


def test_only_the_new_layers_learn():
    model = grow(random_model(**SIZES, window_pattern="L"), 2)
    freeze(model, 2)
    optimizer = model.setup_optimizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):  # in the first step only the projections have a gradient
        model(IDS, IDS.roll(1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {
        "transformer.h.2.attn.c_q.weight",
        "transformer.h.3.mlp.c_fc.weight",
        "value_embeds.3.weight",
    } <= changed
    scalars = {"resid_lambdas", "x0_lambdas", "backout_lambda"}
    assert all(name in scalars or ".h.2." in name or ".h.3." in name or name == "value_embeds.3.weight" for name in changed)  # fmt: skip


def test_a_run_that_grows_resumes_and_the_next_stage_trains_everything(tiny_run):
    flags = {
        "add_layers": 2,
        "freeze_layers": 2,
        "output_tag": "deep",
        "source": "base",
        "eval_every": -1,
        "save_every": 2,
    }
    run_here("base_train", num_iterations=1, eval_every=-1, tie_embeddings=True, qk_scale=2.0)
    run_here("mid_train", **flags)
    with pytest.raises(UserError, match="--lora-rank trains adapters alone"):
        run_here("mid_train", **flags, lora_rank=2)
    directory = tiny_run / "mid_checkpoints" / "deep"
    straight = weights(directory)
    assert Checkpoint.open(directory, 4).config().n_layer == 4
    for path in directory.glob("*_000004.*"):
        path.unlink()
    run_here("mid_train", **flags)
    assert list_steps(directory) == [2, 4]
    resumed = weights(directory)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    base = weights(tiny_run / "base_checkpoints" / "t")
    assert torch.equal(base["transformer.h.1.mlp.c_fc.weight"], straight["transformer.h.1.mlp.c_fc.weight"])
    run_here("chat_sft", model_tag="deep", source="mid", eval_every=-1, num_iterations=2)
    later = weights(tiny_run / "chatsft_checkpoints" / "deep")
    assert not torch.equal(later["transformer.h.1.mlp.c_fc.weight"], base["transformer.h.1.mlp.c_fc.weight"])
