"""Two ranks with half a batch each train what one rank trains with the whole: real processes, gloo."""

from __future__ import annotations

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
    ("stage", "folder"), [("mid_train", "mid"), ("chat_sft", "chatsft"), ("chat_rl", "chatrl")]
)
def test_later_stages(pretrained, stage, folder):
    if stage == "chat_rl":
        run_processes("chat_sft", source="base")
    source = {} if stage == "chat_rl" else {"source": "base"}
    directory = pretrained / f"{folder}_checkpoints" / "t"
    run_processes(stage, ranks=1, **source)
    one = weights(directory)
    run_processes(stage, ranks=2, resume="never", **source)
    assert largest_difference(one, weights(directory)) < ROUNDING


@pytest.mark.slow
def test_resuming_with_another_number_of_ranks(pretrained):
    base = pretrained / "base_checkpoints"
    straight = weights(base / "t")
    run_processes("base_train", ranks=2, arch="classic", model_tag="two", save_every=3)
    for path in (base / "two").glob("*_000006.*"):
        path.unlink()
    output = run_processes("base_train", ranks=1, arch="classic", model_tag="two")
    assert "resuming base at step 3" in output
    assert largest_difference(straight, weights(base / "two")) < ROUNDING
