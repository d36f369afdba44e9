"""--dry-run of pretraining: says everything, writes nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from nanochat.dry_run import fitting_batch, product_speed
from nanochat.memory import Setting, training_memory
from nanochat.network_config import GPTConfig
from scripts.base_train import Config, network, plan_run
from tests.training import run_here


def test_it_prints_what_would_be_trained_and_leaves_nothing(tiny_run, capsys):
    before = sorted(tiny_run.rglob("*"))
    run_here("base_train", dry_run=True, device_batch_size=None)
    said = capsys.readouterr().out
    assert sorted(tiny_run.rglob("*")) == before
    for line in (
        r"wte +16,384", r"total +[\d,]+", r"FLOPs: [\d.e+]+ per token, [\d.e+]+ in all",
        r"batch: 512 tokens = 8 rows x 64 tokens x 1 ranks x 1 accumulation", r"horizon: 6 steps, 3,072 tokens",
        *(rf"  {kind} +0\.\d\d GiB" for kind in ("weights", "gradients", "optimizer", "activations", "logits", "update")),
        r"peak +0\.\d\d GiB, fits the [\d.]+ GiB that are free", r"time: about .* tok/s\) on 1 x cpu",
        r"cost: no price is known without a GPU", r"dry run: nothing was trained or written",
    ):  # fmt: skip
        assert re.search(line, said), f"{line} is not in\n{said}"


def test_a_run_with_slow_steps_says_before_the_first_one_how_long_they_take(tiny_run, capsys, monkeypatch):
    run_here("base_train", num_iterations=1, eval_every=-1)
    assert "time: about" not in capsys.readouterr().out
    monkeypatch.setattr("nanochat.dry_run.SLOW_STEP_S", 0.0)
    run_here("base_train", num_iterations=1, eval_every=-1, resume="never")
    said = capsys.readouterr().out
    assert re.search(r"time: about \d+s a step and \d+s in all, an estimate", said)
    assert said.index("time: about") < said.index("step 00001/")


def test_it_needs_no_tokenizer_and_names_sizes_that_cannot_be(tiny_run, capsys):
    from nanochat.common import UserError

    for path in (tiny_run / "tokenizer").iterdir():
        path.unlink()
    run_here("base_train", dry_run=True, arch="classic", kv_heads=1)
    assert re.search(r"lm_head +1,048,576", capsys.readouterr().out)
    with pytest.raises(UserError, match="n_head 2 is not a multiple of n_kv_head 3"):
        run_here("base_train", dry_run=True, kv_heads=3)


def test_the_heads_of_the_reference_need_not_be_a_multiple_of_the_key_value_heads():
    cfg = Config(depth=16, kv_heads=4)
    horizon = plan_run(cfg, network(cfg, 32768), 1)
    assert (horizon.num_steps, horizon.total_batch_size) == (4992, 2**19)
    assert horizon.weight_decay_scale == pytest.approx(0.4831735)


def test_the_largest_batch_that_fits_is_taken():
    config, setting = GPTConfig(), Setting(1)
    total = 2**19
    peaks = {
        rows: training_memory(config, replace(setting, rows=rows, accumulation=2)).peak for rows in (1, 8, 64)
    }
    roomy = fitting_batch(config, setting, total, [1, 2, 4, 8, 16, 32, 64], peaks[8])
    assert (roomy.rows, roomy.accumulation, roomy.recompute) == (8, 32, False)
    tight = fitting_batch(config, setting, total, [1, 2, 4, 8], 0.99 * peaks[1])
    assert tight.recompute and tight.memory.peak <= 0.99 * peaks[1]
    nothing_fits = fitting_batch(config, setting, total, [1, 2], 1e6)
    assert nothing_fits.memory.peak > 1e6  # and it is said


def test_a_product_is_timed():
    assert product_speed(torch.device("cpu"), torch.float32) > 1e8
