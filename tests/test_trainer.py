"""The training loop through the real scripts: it learns, resumes bit for bit, and refuses nonsense."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import time
from importlib import import_module

import pytest
import torch

from nanochat.checkpoint_manager import Checkpoint, list_steps, update_meta
from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.metrics import read_metrics
from tests.training import ROOT, command, largest_difference, run_here, weights


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def losses(directory) -> list[float]:
    return [e["train/loss"] for e in read_metrics(directory / "metrics.jsonl") if e["kind"] == "train"]


def deterministic(directory) -> list[dict]:
    """All events without what depends on the clock."""
    keep = {"step", "kind", "train/loss", "train/grad_norm", "train/lrm", "train/epoch", "val/bpb", "tokens"}
    return [{k: v for k, v in e.items() if k in keep} for e in read_metrics(directory / "metrics.jsonl")]


@pytest.mark.parametrize("arch", ["modern", "classic"])
def test_base_training_learns_and_records(tiny_run, arch):
    run_here("base_train", arch=arch, num_iterations=30, matrix_lr=0.5, embedding_lr=5.0, unembedding_lr=0.1)
    directory = tiny_run / "base_checkpoints" / "t"
    recorded = losses(directory)
    assert len(recorded) == 30
    assert recorded[0] == pytest.approx(math.log(512), abs=0.1)  # an untrained model knows nothing
    assert sum(recorded[-5:]) / 5 < recorded[0] - 1.0
    summary = json.loads((directory / "run_summary.json").read_text())
    assert summary["num_iterations"] == 30 and summary["tokens_trained"] == 30 * 512
    assert summary["val_bpb"] == pytest.approx(Checkpoint.open(directory, 30).meta["val_bpb"])


def test_a_slow_first_step_counts_as_time_but_not_for_the_time_left(tiny_run, monkeypatch, capsys):
    """The loader of each step takes as long as said here; the status line shows every step."""
    from nanochat.dataloader import PretrainLoader
    from nanochat.metrics import StatusLine

    following, sleeps = PretrainLoader.__next__, iter([3.0, *[0.0] * 7])

    def slow_at_first(self):
        time.sleep(next(sleeps))
        return following(self)

    monkeypatch.setattr(PretrainLoader, "__next__", slow_at_first)
    monkeypatch.setattr(StatusLine, "show", lambda self, text, final=False: print(text))
    run_here("base_train", num_iterations=2, total_batch_size=128, eval_every=-1)
    shown = capsys.readouterr().out
    assert re.search(r"step 00001/00002 .* [3-9]s left\n", shown)
    assert re.search(r"2 steps, 256 tokens in [3-9]s\n", shown)
    sleeps = iter([3.0, *[0.0] * 7])
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # which is what takes the time
    flags = {"num_iterations": 3, "total_batch_size": 128, "eval_every": -1, "resume": "never"}
    run_here("base_train", compile="on", **flags)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 0000")]
    assert ["left" in line for line in shown] == [False, True, True] and re.search("[012]s left$", shown[1])


@pytest.mark.parametrize("stage", ["base_train", "mid_train", "chat_sft"])
def test_resuming_equals_the_straight_run_bit_for_bit(tiny_run, stage):
    folder = {"base_train": "base", "mid_train": "mid", "chat_sft": "chatsft"}[stage] + "_checkpoints"
    directory = tiny_run / folder / "t"
    if stage != "base_train":
        run_here("base_train", num_iterations=2)
    source = {"source": "base"} if stage != "base_train" else {}
    run_here(stage, save_every=2, keep_last=0, resume="never", **source)
    straight, story = weights(directory), deterministic(directory)
    last = list_steps(directory)[-1]
    for step in list_steps(directory)[1:]:
        for path in directory.glob(f"*_{step:06d}.*"):
            path.unlink()
    assert list_steps(directory) == [2] and last > 2
    run_here(stage, save_every=2, keep_last=0, **source)
    resumed = weights(directory)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert deterministic(directory) == story


@pytest.mark.parametrize("arch", ["classic", "modern"])
def test_micro_batches_add_up_to_one_batch(tiny_run, arch):
    for tag, rows in (("whole", 8), ("split", 2)):
        run_here("base_train", arch=arch, device_batch_size=rows, num_iterations=4, model_tag=tag)
    whole, split = (tiny_run / "base_checkpoints" / tag for tag in ("whole", "split"))
    assert losses(whole) == pytest.approx(losses(split), abs=2e-3)
    if arch == "classic":
        # The gradient of modern's backout is zero at the start but for rounding, which AdamW scales up.
        assert largest_difference(weights(whole), weights(split)) < 1e-4


def gradients(directory) -> list[torch.Tensor]:
    """Of the first step of a fresh optimizer, but for a factor: its first moments."""
    state = Checkpoint.open(directory, 1).optimizer_state()
    assert state is not None
    names = ("exp_avg", "momentum_buffer")
    return [entry[name] for entry in state["state"].values() for name in names if name in entry]


def assert_same_gradients(ours, theirs):
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(b.abs().max().item(), 1e-3))


def test_the_split_into_micro_batches_does_not_change_the_gradient(tiny_run):
    """With the mask of SFT every micro-batch has another number of targets."""
    run_here("base_train", num_iterations=2, eval_every=-1)
    folders = {rows: tiny_run / "chatsft_checkpoints" / f"rows{rows}" for rows in (1, 2, 8)}
    for rows, directory in folders.items():
        run_here(
            "chat_sft", source="base", device_batch_size=rows, num_iterations=1, eval_every=-1,
            load_optimizer=False, output_tag=directory.name,
        )  # fmt: skip
    for rows in (1, 2):
        assert losses(folders[rows]) == pytest.approx(losses(folders[8]), rel=1e-5)
        assert_same_gradients(folders[rows], folders[8])


def test_micro_batches_without_targets_add_nothing_among_others(tiny_run, monkeypatch):
    from nanochat.dataloader import PretrainLoader

    following, count = PretrainLoader.__next__, iter(range(10**6))

    def every_second(self):
        inputs, targets = following(self)
        return inputs, targets if next(count) % 2 == 0 else torch.full_like(targets, -1)

    def only_those(self):
        batch = following(self)
        following(self)
        return batch

    flags = {"num_iterations": 1, "eval_every": -1}
    monkeypatch.setattr(PretrainLoader, "__next__", every_second)
    run_here("base_train", model_tag="gaps", total_batch_size=512, **flags)
    monkeypatch.setattr(PretrainLoader, "__next__", only_those)
    run_here("base_train", model_tag="whole", total_batch_size=256, **flags)
    gaps, whole = (tiny_run / "base_checkpoints" / tag for tag in ("gaps", "whole"))
    assert losses(gaps) == pytest.approx(losses(whole), rel=1e-6)
    assert_same_gradients(gaps, whole)


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(tiny_run, capsys):
    run_here("base_train", save_every=3)
    directory = tiny_run / "base_checkpoints" / "t"
    straight = weights(directory)
    path = directory / "model_000006.pt"
    path.write_bytes(path.read_bytes()[:-100])
    run_here("base_train", save_every=3)
    shown = capsys.readouterr()
    assert "model_000006.pt has" in shown.err and "resuming base at step 3" in shown.out
    assert largest_difference(straight, weights(directory)) == 0


def test_a_finished_run_is_not_repeated(tiny_run, capsys):
    run_here("base_train")
    before = (tiny_run / "base_checkpoints" / "t" / "model_000006.pt").stat().st_mtime_ns
    run_here("base_train")
    assert (tiny_run / "base_checkpoints" / "t" / "model_000006.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("stage", "flags"),
    [("chat_sft", {}), ("chat_dpo", {"max_pairs": 8, "max_val_pairs": 8}), ("chat_rl", {})],
)
def test_without_saving_a_stage_leaves_only_its_metrics(tiny_run, stage, flags):
    for earlier in ("base_train", "mid_train"):
        run_here(earlier, num_iterations=1, eval_every=-1)
    before = set(tiny_run.rglob("*"))
    run_here(stage, source="mid", save=False, num_iterations=1, eval_every=-1, **flags)
    made = {path.name for path in set(tiny_run.rglob("*")) - before if path.is_file()}
    assert "metrics.jsonl" in made and made <= {"metrics.jsonl", "lock"}
    run_here(stage, source="mid", num_iterations=1, eval_every=-1, **flags)
    with pytest.raises(UserError, match="--no-save would replace the metrics"):
        run_here(stage, source="mid", save=False, num_iterations=1, eval_every=-1, **flags)
    config = import_module(f"scripts.{stage}").Config
    assert parse(config, ["--no-save"]).save is False
    with pytest.raises(UserError, match="--dry-run is not an option"):
        parse(config, ["--dry-run"])


def test_other_settings_do_not_continue_a_run(tiny_run):
    run_here("base_train")
    with pytest.raises(UserError, match=r"num_steps 6, not 8.*--resume=never"):
        run_here("base_train", num_iterations=8)
    with pytest.raises(
        UserError, match=r"flags describe: n_layer 2 instead of 3.*; .*--model-tag=NAME.*--resume=never"
    ):
        run_here("base_train", depth=3)
    with pytest.raises(UserError, match=r"--resume=5 cannot be done: .*meta_000005.json does not exist"):
        run_here("base_train", resume="5")
    run_here("base_train", num_iterations=2, resume="never")
    assert list_steps(tiny_run / "base_checkpoints" / "t") == [2]


def test_a_run_with_another_tokenizer_is_not_continued(tiny_run):
    for stage in ("base_train", "mid_train"):
        run_here(stage, num_iterations=1, eval_every=-1)
    update_meta(tiny_run / "mid_checkpoints" / "t", 1, {"tokenizer_sha256": "another"})
    with pytest.raises(UserError, match=r"holds a run with another tokenizer.*--resume=never"):
        run_here("mid_train", num_iterations=1, eval_every=-1)


def test_other_rates_take_effect_where_a_run_goes_on(tiny_run, capsys):
    directory = tiny_run / "base_checkpoints" / "t"
    run_here("base_train", save_every=3, keep_last=0)
    run_here("base_train", resume="3", matrix_lr=0.0, embedding_lr=0.0, keep_last=0)
    assert "--matrix-lr=0.0 (was 0.02)" in capsys.readouterr().out
    before, after = weights(directory, 3), weights(directory, 6)
    assert torch.equal(before["transformer.h.0.attn.c_q.weight"], after["transformer.h.0.attn.c_q.weight"])
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_going_back_leaves_nothing_of_the_other_branch(tiny_run, capsys):
    directory = tiny_run / "base_checkpoints" / "t"
    run_here("base_train", save_every=2, keep_last=0)
    assert list_steps(directory) == [2, 4, 6]
    capsys.readouterr()
    with pytest.raises(UserError, match="num_steps"):
        run_here("base_train", resume="2", num_iterations=9)
    assert list_steps(directory) == [2, 4, 6], "nothing is deleted for a run that does not start"
    run_here("base_train", resume="2", keep_last=0)
    assert (
        f"deleting the checkpoints of an earlier run in {directory}: steps [4, 6]" in capsys.readouterr().out
    )
    assert list_steps(directory) == [2, 6]


def test_starting_over_deletes_nothing_before_the_first_step_is_made(tiny_run, monkeypatch, capsys):
    def left() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in tiny_run.glob("*_checkpoints/t/*0*.*"))

    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    for stage in ("base_train", "mid_train"):
        run_here(stage, num_iterations=2, eval_every=-1)
    before, stories = left(), [losses(tiny_run / f"{stage}_checkpoints" / "t") for stage in ("base", "mid")]
    assert len(before) == 6
    with pytest.raises(UserError, match=r"/nope does not exist"):
        run_here("mid_train", resume="never", extra_data="/nope")
    for stage in ("base_train", "mid_train"):
        with pytest.raises(UserError, match="not a multiple"):
            run_here(stage, resume="never", total_batch_size=50)
    monkeypatch.setattr("nanochat.loss_eval.evaluate_bpb", lambda *_: 1 / 0)  # that of before the first step
    with pytest.raises(ZeroDivisionError):
        run_here("base_train", resume="never")
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr("nanochat.training_run.TrainingRun.update", out_of_memory)
        run_here("base_train", resume="never", eval_every=-1)
    assert left() == before
    assert [losses(tiny_run / f"{stage}_checkpoints" / "t") for stage in ("base", "mid")] == stories
    assert "deleting" not in capsys.readouterr().out
    run_here("base_train", resume="never", num_iterations=1, eval_every=-1)
    assert list_steps(tiny_run / "base_checkpoints" / "t") == [1]
    assert len(losses(tiny_run / "base_checkpoints" / "t")) == 1
    assert "deleting the checkpoints of an earlier run" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [{"resume": "3"}, {"total_batch_size": 500}, {"eval_every": 1}])
def test_a_start_that_fails_leaves_no_folder(tiny_run, monkeypatch, flags):
    monkeypatch.setattr("nanochat.loss_eval.evaluate_bpb", lambda *_: 1 / 0)
    with pytest.raises((UserError, ZeroDivisionError)):
        run_here("base_train", **flags)
    assert not (tiny_run / "base_checkpoints").exists()


def test_an_evaluation_that_fails_loses_nothing(tiny_run, monkeypatch):
    results = iter([1.0])  # at the start; the next one, at step 3, fails
    monkeypatch.setattr("nanochat.training_run.UNSAVED_S", 0.0)
    monkeypatch.setattr("nanochat.loss_eval.evaluate_bpb", lambda *_: next(results))
    with pytest.raises(StopIteration):
        run_here("base_train")
    assert list_steps(tiny_run / "base_checkpoints" / "t") == [3]


def test_a_stop_does_not_wait_for_an_evaluation(tiny_run, monkeypatch):
    steps = iter([0, 3])

    def evaluate(*_) -> float:
        if next(steps) == 3:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("went on")
        return 1.0

    monkeypatch.setattr("nanochat.loss_eval.evaluate_bpb", evaluate)
    with pytest.raises(KeyboardInterrupt):
        run_here("base_train")
    assert list_steps(tiny_run / "base_checkpoints" / "t") == [3]


def test_non_finite_losses_are_skipped_and_end_the_run(tiny_run, monkeypatch):
    from nanochat.gpt import GPT

    monkeypatch.setattr(GPT, "_loss", lambda self, x, targets, reduction: x.sum() * math.nan)
    monkeypatch.setattr("nanochat.training_run.MAX_SKIPPED_IN_A_ROW", 3)
    with pytest.raises(UserError, match="3 steps in a row gave no usable loss"):
        run_here("base_train", eval_every=-1)
    directory = tiny_run / "base_checkpoints" / "t"
    assert list_steps(directory) == [3]
    assert all(tensor.isfinite().all() for tensor in weights(directory).values())


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is(tiny_run, monkeypatch):
    from nanochat.gpt import GPT

    whole = GPT._loss
    run_here("base_train", num_iterations=2, model_tag="good", eval_every=-1)
    # adds 0, whose gradient is 0 times infinity
    monkeypatch.setattr(GPT, "_loss", lambda self, x, *rest: whole(self, x, *rest) + (0 * x).sum().sqrt())
    run_here("base_train", num_iterations=2, eval_every=-1)
    bad, good = (tiny_run / "base_checkpoints" / tag for tag in ("t", "good"))
    assert Checkpoint.open(bad, 2).meta["loop_state"]["skipped_steps"] == 2
    assert losses(bad)[0] == losses(good)[0]
    assert all(tensor.isfinite().all() for tensor in weights(bad).values())


def test_clipping_reaches_the_optimizer_and_the_norm_is_logged(tiny_run):
    found = {}
    for clip_norm in (0.0, 1e3, 1e-4):
        run_here("base_train", num_iterations=3, clip_norm=clip_norm, eval_every=-1, resume="never")
        directory = tiny_run / "base_checkpoints" / "t"
        events = [e for e in read_metrics(directory / "metrics.jsonl") if e["kind"] == "train"]
        assert all(event["train/grad_norm"] > 1e-3 for event in events)
        found[clip_norm] = weights(directory)
    assert largest_difference(found[0.0], found[1e3]) == 0
    assert largest_difference(found[0.0], found[1e-4]) > 1e-6


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8", "mxfp4"])
def test_every_precision_trains_alike(tiny_run, monkeypatch, precision):
    monkeypatch.setattr("nanochat.precision.supports_fp8", lambda device: (True, "torch emulates it"))
    sizes = {"aspect_ratio": 64, "head_dim": 64, "num_iterations": 4, "total_batch_size": 128}
    for name in ("fp32", precision):
        run_here("base_train", precision=name, model_tag=name, **sizes)
    exact, ours = (tiny_run / "base_checkpoints" / name for name in ("fp32", precision))
    meta = Checkpoint.open(ours, 4).meta
    assert meta["loop_state"]["skipped_steps"] == 0
    assert meta["loop_state"]["loss_scale"] == (2.0**16 if precision == "fp16" else 1.0)
    assert losses(ours) == pytest.approx(losses(exact), abs=0.05)
    assert meta["val_bpb"] == pytest.approx(Checkpoint.open(exact, 4).meta["val_bpb"], abs=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in weights(ours).values())


def test_overflow_in_fp16_lowers_the_loss_scale_and_training_goes_on(tiny_run, monkeypatch):
    monkeypatch.setattr("nanochat.precision._LARGEST_SCALE", 2.0**40)
    run_here("base_train", precision="fp16", num_iterations=18, total_batch_size=128, eval_every=-1)
    directory = tiny_run / "base_checkpoints" / "t"
    state = Checkpoint.open(directory, 18).meta["loop_state"]
    assert 0 < state["skipped_steps"] < 18 and state["skipped_in_a_row"] == 0
    assert state["loss_scale"] == 2.0 ** (40 - state["skipped_steps"])


def test_fp8_needs_hardware(tiny_run):
    with pytest.raises(UserError, match="--precision=fp8, but cpu has no FP8 tensor cores"):
        run_here("base_train", precision="fp8")


def test_a_batch_without_targets_changes_nothing(tiny_run, monkeypatch):
    """No NaN, no update: the step is skipped."""
    from nanochat.dataloader import PretrainLoader

    following = PretrainLoader.__next__

    def without_targets(self):
        inputs, targets = following(self)
        return inputs, torch.full_like(targets, -1)

    run_here("base_train", num_iterations=1, model_tag="one", eval_every=-1)
    monkeypatch.setattr(PretrainLoader, "__next__", without_targets)
    run_here("base_train", num_iterations=3, eval_every=-1, total_batch_size=128)
    meta = Checkpoint.open(tiny_run / "base_checkpoints" / "t", 3).meta
    assert meta["loop_state"]["skipped_steps"] == 3
    assert all(tensor.isfinite().all() for tensor in weights(tiny_run / "base_checkpoints" / "t").values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_from_there(tiny_run, number):
    arguments = command("base_train", num_iterations=100_000, eval_every=-1)
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    directory = tiny_run / "base_checkpoints" / "t"
    deadline = time.monotonic() + 120
    while not ((directory / "metrics.jsonl").exists() and len(losses(directory)) > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-2000:]
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output[-2000:]
    (step,) = list_steps(directory)
    assert f"saved step {step}" in output
