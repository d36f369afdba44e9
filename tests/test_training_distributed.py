"""Two ranks with half a batch each train what one rank trains with the whole: real processes, gloo."""

from __future__ import annotations

import shutil

import pytest

from tests.training import largest_difference, run_processes, weights

# fp32 sums in another order; AdamW and Muon then scale small differences up a little
ROUNDING = 2e-4


@pytest.fixture
def pretrained(tiny_run):
    # classic: the gradient of modern's backout is zero at the start but for rounding, which AdamW scales up
    run_processes("base_train", ranks=1, arch="classic")
    return tiny_run


def test_base_training(pretrained):
    run_processes("base_train", ranks=2, arch="classic", model_tag="two")
    base = pretrained / "base_checkpoints"
    assert largest_difference(weights(base / "t"), weights(base / "two")) < ROUNDING


@pytest.mark.parametrize(
    ("stage", "folder", "flags"),
    [
        ("mid_train", "mid", {"source": "base"}),
        ("mid_train", "mid", {"source": "base", "add_layers": 1, "freeze_layers": 2}),
        ("chat_sft", "chatsft", {"source": "base"}),
        ("chat_rl", "chatrl", {}),
    ],
)
def test_later_stages(pretrained, stage, folder, flags):
    if stage == "chat_rl":
        run_processes("chat_sft", source="base")
    directory = pretrained / f"{folder}_checkpoints" / "t"
    run_processes(stage, ranks=1, **flags)
    one = weights(directory)
    run_processes(stage, ranks=2, resume="never", **flags)
    assert largest_difference(one, weights(directory)) < ROUNDING


@pytest.mark.slow
def test_one_to_four_ranks_train_alike(tiny_run):
    """12 rows a step: 12, 6, 4 and 3 micro-batches of one row on each rank."""
    flags = {"arch": "classic", "total_batch_size": 768, "device_batch_size": 1}
    base = tiny_run / "base_checkpoints"
    for ranks in (1, 2, 3, 4):
        run_processes("base_train", ranks, model_tag=f"ranks{ranks}", **flags)
    one = weights(base / "ranks1")
    for ranks in (2, 3, 4):
        # Twelve micro-batches are added in other orders; Adam's division makes a difference of small gradients large.
        assert largest_difference(one, weights(base / f"ranks{ranks}")) < 5 * ROUNDING, f"{ranks} ranks"


@pytest.mark.slow
def test_resuming_with_another_number_of_ranks(tiny_run):
    """Two ranks begin, one or three go on."""
    flags = {"arch": "classic", "total_batch_size": 768, "save_every": 3}
    base = tiny_run / "base_checkpoints"
    run_processes("base_train", 2, **flags)
    straight = weights(base / "t")
    for path in (base / "t").glob("*_000006.*"):
        path.unlink()
    for ranks in (1, 3):
        shutil.copytree(base / "t", base / f"ranks{ranks}")
        output = run_processes("base_train", ranks, **flags, model_tag=f"ranks{ranks}")
        assert "resuming base at step 3" in output
        assert f"world_size {ranks} instead of 2: the same run up to rounding" in output
        assert largest_difference(straight, weights(base / f"ranks{ranks}")) < ROUNDING
