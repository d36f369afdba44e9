from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nanochat.checkpoint_manager import Checkpoint, list_steps, update_meta
from nanochat.common import UserError
from nanochat.download import Facts
from nanochat.manifests import imported_set, record_files
from nanochat.validation_data import KEY, find_validation_data
from scripts import base_eval
from tests.toy_data import make_world, write_shard
from tests.training import run_here


@pytest.fixture
def own_data(tiny_run, monkeypatch) -> Path:
    """The folder of a data set of one's own, which the scripts of this test use."""
    monkeypatch.setenv("NANOCHAT_DATA", "hub")
    monkeypatch.setenv("NANOCHAT_DATASET", "mine")
    folder = tiny_run / "imported_data" / "mine"
    for name in ("a.parquet", "b.parquet"):
        write_shard(folder / name, [[f"text {i} of the file {name}" for i in range(50)]])
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def measure() -> None:
    base_eval.main(
        base_eval.Config(eval="bpb", device_batch_size=2, split_tokens=512, device_type="cpu", model_tag="t")
    )


def test_a_run_records_its_validation_data_and_goes_on_with_no_other(own_data, tiny_run, capsys):
    run_here("base_train", num_iterations=4, save_every=2)
    folder = tiny_run / "base_checkpoints" / "t"
    recorded = {"mine/b.parquet": sha256(own_data / "b.parquet")}
    assert Checkpoint.open(folder, 4).meta[KEY] == recorded
    assert f"mine/b.parquet (SHA-256 {recorded['mine/b.parquet'][:12]}...)" in capsys.readouterr().out
    measure()
    assert not capsys.readouterr().err

    (own_data / "b.parquet").rename(own_data / "c.parquet")  # the same bytes, and the last by name again
    run_here("base_train", num_iterations=4, resume="2")
    write_shard(own_data / "c.parquet", [["other text"] * 50])
    with pytest.raises(
        UserError, match=r"validated on mine/b\.parquet .*, and here is mine/c\.parquet .*--eval-every=-1"
    ):
        run_here("base_train", num_iterations=4, resume="2")
    run_here("base_train", num_iterations=4, resume="2", eval_every=-1)
    assert Checkpoint.open(folder, 4).meta[KEY] == recorded
    capsys.readouterr()
    measure()
    assert "warning: this model was validated on mine/b.parquet" in capsys.readouterr().err


def test_a_checkpoint_that_says_nothing_goes_on(own_data, tiny_run):
    """Those of before November 2026."""
    run_here("base_train", num_iterations=4, save_every=2)
    folder = tiny_run / "base_checkpoints" / "t"
    assert list_steps(folder) == [2, 4]
    update_meta(folder, 2, {KEY: None})
    run_here("base_train", num_iterations=4, resume="2")
    assert Checkpoint.open(folder, 4).meta[KEY] == {"mine/b.parquet": sha256(own_data / "b.parquet")}


def test_a_shard_must_be_the_one_of_its_manifest(own_data):
    path = own_data / "b.parquet"
    record_files(imported_set("mine"), own_data, {path.name: Facts(path.stat().st_size, sha256(path))})
    assert find_validation_data(make_world()) == {"mine/b.parquet": sha256(path)}
    assert find_validation_data(make_world(rank=1, size=2)) == {}
    write_shard(path, [["other text"]])
    with pytest.raises(UserError, match=r"b\.parquet is not the one of its manifest \(SHA-256 .* instead of"):
        find_validation_data(make_world())
