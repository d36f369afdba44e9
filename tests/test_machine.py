"""What a container leaves of a machine."""

from __future__ import annotations

import os

import torch

from nanochat import machine
from nanochat.common import check_device

GIB = 2**30


def container(monkeypatch, folder, **files) -> None:
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)
    monkeypatch.setattr(machine, "_CGROUP", folder)


def test_without_a_container_the_machine_is_all_ours(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.usable_cores() == len(os.sched_getaffinity(0))
    assert 0 < machine.free_ram() <= machine.total_ram()
    container(monkeypatch, tmp_path, cpu_max="max 100000", memory_max="max", memory_current="1")
    assert machine.usable_cores() == len(os.sched_getaffinity(0))
    assert 0 < machine.free_ram() <= machine.total_ram()


def test_quota_and_limit_of_a_container(monkeypatch, tmp_path):
    container(
        monkeypatch, tmp_path, cpu_max="100000 100000", memory_max=f"{GIB}", memory_current=f"{GIB - 1000}",
        memory_stat=f"anon 1\nfile {GIB // 2}\ninactive_file {GIB // 4}\n",
    )  # fmt: skip
    assert machine.usable_cores() == 1
    assert machine.total_ram() == GIB
    assert machine.free_ram() == GIB // 4 + 1000, "files that were read give way"


def test_a_rank_takes_its_share_of_the_cores(monkeypatch, one_seeded_thread):
    monkeypatch.setattr("nanochat.common.usable_cores", lambda: 8)
    torch.set_num_threads(3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    check_device("cpu")
    assert torch.get_num_threads() == 3, "no more than torch would"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun does
    check_device("cpu")
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    torch.set_num_threads(5)
    check_device("cpu")
    assert torch.get_num_threads() == 5
